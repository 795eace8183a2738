"""The aliases of one run in one directory: which names are free for them, and what they point to."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from itertools import chain

import attrs

from checkpointer.commit import index
from checkpointer.commit.transaction import Transaction
from checkpointer.errors import CheckpointerWarning
from checkpointer.policy.policy import Policy
from checkpointer.ports import Stat, SupportsLinks, SupportsPaths
from checkpointer.records.manifest import Manifest
from checkpointer.records.record import Record
from checkpointer.storage.digests import algorithm_of, digest_of

__all__ = ["Aliases"]


@attrs.define
class Aliases:
    """Chooses alias names that replace nothing of others, and swings them; the directory tells it what is there."""

    transaction: Transaction
    asked: Policy
    """The policy with the alias names that were asked for."""
    listing: index.Listing
    """What the directory held when it was opened."""
    _pointed: dict[str, str] = attrs.field(factory=dict, init=False)
    """Token of the checkpoint that each alias was pointed to."""
    _made: dict[str, Stat] = attrs.field(factory=dict, init=False)
    """What the file of each alias looked like when it was made, or found to be ours; where a look costs no request."""
    _claimed: set[str] = attrs.field(factory=set, init=False)
    """Names that are this manager's, even if the marks that say so are deleted."""

    def settle(self, manifest: Manifest, say: Callable[[str, str], None], *, slots: bool, claim: bool) -> Policy:
        """Return the policy with alias names that are free; with ``claim`` keep them, and ``say`` where they differ.

        ``slots``: a checkpoint of another run under the alias counts as well.
        """
        naming = self.asked.name
        for field in ("last", "best"):
            if not getattr(self.asked, field):
                continue
            stem = getattr(self.asked.name, field)
            name = naming.free_name(stem, _Blocked(self, manifest, slots))
            naming = attrs.evolve(naming, **{field: name.removesuffix(naming.suffix)})  # type: ignore[arg-type]
            if claim:
                self.transaction.claim(name, manifest.label)
                self._claimed.add(name)
            if claim and name != stem + naming.suffix:
                say(name, f"{stem}{naming.suffix} is not this run's; the alias is {name} instead")
        return attrs.evolve(self.asked, name=naming)

    def point(self, policy: Policy, manifest: Manifest) -> Manifest:
        """Let ``last`` and ``best`` name what they should; return the manifest without slots that made way for one."""
        history = manifest.history
        newest = manifest.newest
        for alias, how in policy.aliases.items():
            target = newest if alias == policy.name.last_file else policy.best_of(history)
            if target is None:
                self._remove_dangling(alias)
            if target is None or target.name == alias or self._pointed.get(alias) == target.token:
                continue
            slot = manifest.by_name.get(alias) or next((r for r in manifest.aside if r.name == alias), None)
            try:
                self.transaction.alias(alias, how, target, slot=slot)
            except OSError as error:
                msg = f"the alias {alias} could not be made ({error}); {target.name} itself is saved"
                warnings.warn(msg, CheckpointerWarning, stacklevel=5)
                continue
            self._pointed[alias] = target.token
            self._remember(alias)
            if slot is not None:
                manifest = manifest.without(alias)
        return manifest

    def _remove_dangling(self, alias: str) -> None:
        """Remove a link whose target is gone, when nothing takes its place; a copy is a whole checkpoint and stays."""
        storage = self.transaction.storage
        if isinstance(storage, SupportsLinks) and storage.list(alias):
            try:
                storage.open(alias).close()
            except FileNotFoundError:
                self.forget(alias)
                with contextlib.suppress(OSError):
                    storage.delete(alias)
            except OSError:  # A folder.
                return

    def forget(self, alias: str | None = None) -> None:
        """Count an alias, or all, as pointing nowhere: something else has taken its place, or its owner is another."""
        if alias is None:
            self._pointed.clear()
        else:
            self._pointed.pop(alias, None)
            self._remember(alias)

    def replaced(self, policy: Policy, manifest: Manifest) -> list[str]:
        """Return the aliases in whose place others have put files of their own."""
        return [alias for alias in policy.aliases if self.is_blocked(alias, manifest, slots=True)]

    def is_blocked(self, alias: str, manifest: Manifest, *, slots: bool) -> bool:
        """Return whether the alias would replace a file of others; ``slots``: or a checkpoint of another run."""
        record = manifest.by_name.get(alias)
        if record is None and slots:
            record = self.transaction.committed(alias)
        if record is not None and (record.run, record.label) != (manifest.run, manifest.label):
            return slots
        if index.record_path(alias) in self.listing.damaged:
            return True
        if not self._is_taken(alias, manifest):
            return False
        if alias not in self._claimed and record is None and not self.transaction.is_marked(alias):
            return True
        return not self._is_ours(alias, manifest)

    def _is_taken(self, alias: str, manifest: Manifest) -> bool:
        """Return whether a file has the name; where case does not tell names apart, the storage knows."""
        listed = self.transaction.storage.list
        if self._is_near:
            return bool(listed(alias))
        folded = alias.casefold()
        foreign = manifest.foreign
        return alias in foreign or (any(name.casefold() == folded for name in foreign) and bool(listed(alias)))

    @property
    def _is_near(self) -> bool:
        return isinstance(self.transaction.storage, SupportsLinks)

    def _is_ours(self, alias: str, manifest: Manifest) -> bool:
        """Return whether what has the name of an alias is a link or copy of a checkpoint, or a checkpoint.

        Where a look costs a request, only the size is known, from when the directory was opened.
        """
        if not self._is_near:
            found = self.listing.files.get(alias)
            known = self._known(manifest)
            return found is None or alias in self._claimed or any(record.size == found.size for record in known)
        there = self.transaction.storage.list(alias).get(alias)
        if there is None:
            return False  # A folder: an alias of one is a link.
        if self._made.get(alias) != there:
            if not self._leads_to_one(alias, manifest):
                return False
            self._made[alias] = there
        return True

    def _leads_to_one(self, alias: str, manifest: Manifest) -> bool:
        """Return whether a file is a link within the directory, or has the bytes of a checkpoint."""
        storage = self.transaction.storage
        slot = manifest.by_name.get(alias) if alias not in self._made else None
        if slot is not None and self.transaction.has_payload(slot):
            return True
        alike = [*self._known(manifest)]
        if isinstance(storage, SupportsPaths):
            path = storage.local_path(alias)
            if os.path.islink(path):
                target = os.path.normpath(os.path.join(os.path.dirname(alias), os.readlink(path)))
                return not target.startswith((os.sep, os.pardir + os.sep))
            alike = [record for record in alike if record.size == os.path.getsize(path)]
            if any(_is_same_file(path, storage.local_path(r.name)) for r in alike if r.name != alias):
                return True
        digests = {record.digest for record in alike}
        with contextlib.suppress(FileNotFoundError):
            found = [digest_of(storage, alias, algorithm) for algorithm in {*map(algorithm_of, digests)}]
            return any(digest in digests for _, digest in filter(None, found))
        return True  # A link that leads nowhere.

    def _known(self, manifest: Manifest) -> Iterator[Record]:
        """Yield every record that an alias may have been made of: retired or replaced ones too, if they are there."""
        entries = self.listing.entries.values()
        replaced = (entry.previous for entry in entries if entry.previous is not None)
        return chain(manifest.records, manifest.aside, (entry.record for entry in entries), replaced)

    def _remember(self, alias: str) -> None:
        """Note what the file of an alias looks like that was made a moment ago."""
        if alias not in self._claimed:
            return
        there = self.transaction.storage.list(alias).get(alias) if self._is_near else None
        if there is not None:
            self._made[alias] = there


def _is_same_file(path: str, other: str) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:
        return False


@attrs.frozen
class _Blocked:
    """The alias names that are not free, as a container that is asked name by name."""

    aliases: Aliases
    manifest: Manifest
    slots: bool

    def __contains__(self, alias: object) -> bool:
        return self.aliases.is_blocked(str(alias), self.manifest, slots=self.slots)
