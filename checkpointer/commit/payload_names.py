"""Names of payloads in one directory: which are free, and how a checkpoint gets another one."""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Sequence

import attrs

from checkpointer.commit.aliases import duplicate
from checkpointer.commit.contents import Contents
from checkpointer.commit.deleted_by_others import Looks
from checkpointer.commit.recovery import is_payload_of
from checkpointer.errors import NameTakenError, StorageError
from checkpointer.policy.decide import own_name
from checkpointer.ports import Storage, SupportsPaths, SupportsURLs
from checkpointer.records.record import Entry, Record


@attrs.frozen
class Names:
    """Finds free names, and renames checkpoints."""

    _contents: Contents
    _looks: Looks

    def is_free(self, name: str) -> bool:
        """Return whether the storage has nothing of this name now. If it has, the name is remembered as taken."""
        contents = self._contents
        if contents.storage.list(name) or (contents.journal.has_record(name) and self.lost(name) is None):
            contents.add_foreign(name)
            return False
        return True

    def let_replace(self, names: Iterable[str]) -> None:
        """Let the next checkpoints and aliases of these names replace files that have no record."""
        contents, names = self._contents, frozenset(names)
        contents.aliases.yielding |= names
        contents.manifest = attrs.evolve(contents.manifest, foreign=contents.manifest.foreign - names)

    def yields(self, name: str) -> bool:
        """Return whether the file of this name has no record, and a checkpoint may replace it."""
        contents = self._contents
        is_taken = name not in contents.aliases.yielding or contents.manifest.is_taken(name)
        return not is_taken and not contents.journal.has_record(name)

    def lost(self, name: str) -> Record | None:
        """Return the record of a payload that is gone, if another payload may be saved under its name."""
        return None if self._contents.policy.name.version_counter else self._contents.manifest.lost(name)

    def own(self, record: Record, taken: Container[str] | None = None) -> str:
        """Return the name that the template gives a checkpoint, even if it lies under an alias now."""
        return own_name(self._contents.policy, record, self._contents.manifest, taken)

    def free(self, record: Record) -> str:
        """Return the record's name if it is free here, else one that its template gives it."""
        name = record.name
        is_taken = self._contents.manifest.is_taken(name) or name in self._contents.policy.aliases
        while is_taken or not self.is_free(name):
            name, is_taken = self.own(record), False
        return name

    def move_slot(self, slot: Record, *, maybe: Sequence[Record] = ()) -> Record | None:
        """Give a checkpoint that was written under the alias a name of its own; None if its payload is gone.

        If another writer may replace the payload meanwhile, ``maybe`` has what it can be.
        """
        if self._looks.any_gone([slot]):
            return None
        held, term = self._contents.journal.term, slot.term
        if held is not None and (held.run, held.label) == (slot.run, slot.label):
            # What was abandoned stays so: a record of this writer's term would count.
            term = held.number if self._contents.manifest.is_of_holder(slot) else slot.term
        while True:
            name = self.free(slot)
            try:
                moved = self._relocate(slot, attrs.evolve(slot, name=name, term=term), maybe)
                break
            except NameTakenError:
                # Another manager has taken the name since the check.
                self._contents.add_foreign(name)
            except FileNotFoundError:
                self._looks.any_gone([slot])
                if self._looks.exists(slot):
                    raise
                return None  # It was deleted since the look above.
        if moved is not None:
            self._replace(slot, moved)
        return moved

    def _relocate(self, record: Record, moved: Record, maybe: Sequence[Record]) -> Record | None:
        """Give a checkpoint the name of ``moved`` by a copy or hard link. After a crash both names may have it.

        With ``maybe`` the digest of the copy decides before any record is changed. Returns None if the copy is none of
        them.
        """
        journal, name = self._contents.journal, moved.name
        journal.announce(journal.pending(moved))
        try:
            duplicate(journal.storage, record.name, name, "hardlink")
        except FileNotFoundError:
            journal.delete(name)
            raise
        if maybe:
            copies = (attrs.evolve(one, name=name, term=moved.term) for one in maybe)
            proved = next((copy for copy in copies if is_payload_of(journal, copy)), None)
            if proved is None:
                with journal.changing(journal.retiring(moved)):
                    journal.storage.delete(name)
                    journal.delete(name)
                return None
            moved = proved
        with journal.changing(aliases=[record.name]):
            return self._replace_record(record, moved)

    def _rename(self, storage: SupportsPaths, record: Record, name: str) -> Record:
        """Rename a checkpoint on a disk. After a crash exactly one name has it.

        Both records exist for a moment, with the same token. `recover` takes the one that has a payload.
        """
        journal, moved = self._contents.journal, attrs.evolve(record, name=name)
        journal.announce(journal.pending(moved))
        with journal.changing(aliases=[record.name]):
            os.rename(storage.local_path(record.name), storage.local_path(name))
            storage.sync(name)
            return self._replace_record(record, moved)

    def _replace_record(self, old: Record, new: Record) -> Record:
        self._contents.journal.put(Entry(record=new))
        self._contents.journal.delete(old.name)
        return new

    def _replace(self, old: Record, new: Record) -> None:
        manifest = self._contents.manifest
        resumed = new.name if manifest.resumed == old.name else manifest.resumed
        self._contents.manifest = attrs.evolve(manifest.without(old.name).with_record(new), resumed=resumed)

    def make_way(self, name: str, stem: str) -> str | None:
        """Rename the file or folder of this name, with its record if it has one.

        Returns:
            The new name; None if there is nothing of this name.

        Raises:
            StorageError: If the storage has no paths to rename.
        """
        contents, storage = self._contents, self._contents.storage
        record = contents.manifest.by_name.get(name)
        if record is not None and self._looks.any_gone([record]):
            record = None
        if record is None and not storage.list(name):
            self._rename_missing(name, stem)
            return None
        if not isinstance(storage, SupportsPaths):
            msg = f"{name} cannot be renamed: {storage} has no paths"
            raise StorageError(msg)
        contents.prepare()
        new = self._unused(stem)
        if record is None:
            # The next record's write syncs the folder that holds both.
            with contents.journal.changing(aliases=[name]):
                os.rename(storage.local_path(name), storage.local_path(new))
            contents.manifest = attrs.evolve(contents.manifest, foreign=(contents.manifest.foreign - {name}) | {new})
            return new
        self._replace(record, self._rename(storage, record, new))
        contents.aliases.forget()
        return new

    def _rename_missing(self, name: str, stem: str) -> None:
        """Rename the record of a payload that is gone, so that another payload can have its name."""
        contents = self._contents
        missing = next((record for record in contents.manifest.aside if record.name == name), None)
        if missing is None:
            return
        contents.prepare()
        moved = attrs.evolve(missing, name=self._unused(stem))
        with contents.journal.changing(aliases=[name]):
            contents.journal.put(Entry(record=moved))
            contents.journal.delete(name)
        contents.manifest = contents.manifest.without(name).without_payload(moved)

    def disown(self, record: Record) -> None:
        """Remove a record whose payload was replaced by another file; the name stays taken."""
        contents = self._contents
        with contents.journal.changing(aliases=[record.name]):
            contents.journal.delete(record.name)
        contents.manifest = contents.manifest.without(record.name)
        contents.add_foreign(record.name)

    def _unused(self, stem: str) -> str:
        while True:
            taken = self._contents.manifest.taken.union(self._contents.policy.aliases)
            new = self._contents.policy.name.free_name(stem, taken)
            if self.is_free(new):
                return new


def location(storage: Storage, name: str) -> str:
    """Return the full path or URL of a payload, without a password."""
    return storage.local_path(name) if isinstance(storage, SupportsPaths) else f"{storage}/{name}"


def address(storage: Storage, name: str) -> str:
    """Return the path or URL by which other programs open a payload, with the password of a URL."""
    return storage.url(name) if isinstance(storage, SupportsURLs) else location(storage, name)
