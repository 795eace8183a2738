"""One run's view of one directory: its records, its aliases, and what was left half-way by earlier processes."""

from __future__ import annotations

import contextlib
import math
import os
import uuid
import warnings
from collections.abc import Container, Iterable

import attrs

from checkpointer import index
from checkpointer.aliases import Aliases
from checkpointer.clock import SystemClock
from checkpointer.deciding import own_name, surplus
from checkpointer.errors import CheckpointerWarning, NameTakenError, RecordError, StorageError, UntrustedError
from checkpointer.manifest import Manifest
from checkpointer.owner import is_live
from checkpointer.policy import Policy
from checkpointer.ports import Clock, Storage, SupportsPaths, SupportsSweep, SupportsURLs
from checkpointer.records import SCHEMA, Entry, Line, Record, as_number, check_readable
from checkpointer.transaction import Transaction
from checkpointer.trust import HMACKey

__all__ = ["Directory"]

INDEX_EVERY = 64
"""The index is written anew after this many changes, or a tenth of the records if that is more."""


class Directory:
    """Keeps manifest and storage in step: every change of one is a change of the other.

    Args:
        storage: Where the files are.
        owner: Id of this writer.
        policy: What is asked for; `policy` is the same with the alias names that are really free.
        run: Id of the run to go on with; None for a new one.
        label: Tells managers apart that share the directory.
        writes: Whether to claim aliases and clear up after dead writers now; a reader changes nothing.
        trust: Signs what is written; what it has not signed is damaged.
        clock: Tells when a payload takes long.
    """

    def __init__(
        self,
        storage: Storage,
        owner: str,
        policy: Policy,
        *,
        run: str | None,
        label: str,
        writes: bool,
        trust: HMACKey | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.storage = storage
        self.transaction = Transaction(storage, owner, trust, clock or SystemClock())
        self.policy = policy
        self.claimed = run is not None
        self._prepared = False
        self._begun = False
        self._on_line = False
        self._said: set[str] = set()
        listing = _listing(storage, trust)
        self.damaged = listing.damaged
        self._aliases = Aliases(self.transaction, policy, self.damaged)
        self._signed = sum(bool(entry.signature) for entry in listing.entries.values())
        self._unindexed = listing.reads
        if writes:
            self.prepare()
        records, self._left = self.transaction.recover(listing, write=writes)
        half_way = {entry.record.name for entry in self._left} - {record.name for record in records}
        self.manifest = Manifest(
            records=records,
            run=run or uuid.uuid4().hex[:12],
            label=label,
            foreign=listing.foreign | half_way,
            seen=frozenset(metric for record in records for metric in record.metrics),
        )
        if self.manifest.own:
            self.manifest = self.manifest.seen_by(self.manifest.run, self.manifest.own[-1].line)
        self._settle_aliases(slots=False, claim=writes)
        self._settle_aliases(slots=True, claim=False)

    def look(self) -> Manifest:
        """Return the manifest, as it is now."""
        return self.manifest

    @property
    def view(self) -> Manifest:
        """The manifest; before this run has saved or restored, as the newest run under the label sees it."""
        manifest = self.manifest  # Once: with background= another thread goes on with it.
        if self.claimed or manifest.own:
            return manifest
        labelled = [record for record in manifest.records if record.label == manifest.label]
        if not labelled:
            return manifest
        return manifest.seen_by(labelled[-1].run, labelled[-1].line)

    def widened(self, elsewhere: Iterable[Record]) -> Manifest:
        """Return the view with what only a mirror holds, under the names it would get here."""
        here = {record.token for record in self.manifest.records}
        taken = set(self.manifest.taken.union(self.policy.aliases))
        found = []
        for record in elsewhere:
            if record.token not in here:
                name = record.name if record.name not in taken else self.own_name(record, taken)
                taken.add(name)
                found.append(attrs.evolve(record, name=name))
        self.manifest = attrs.evolve(self.manifest, elsewhere=tuple(found))
        view, wide = self.view.everywhere, self.manifest.everywhere
        if self._on_line:
            return wide
        # Before this process has saved or restored, a run is where its newest record is, wherever that is.
        labelled = [record for record in wide.records if record.label == wide.label]
        if not self.claimed and not view.own and labelled:
            view = view.seen_by(labelled[-1].run, labelled[-1].line)
        return view.seen_by(view.run, view.own[-1].line) if view.own else view

    def created(self, clock: Clock) -> float:
        """Return when a time trigger began to count if nothing was ever saved: the first writer's start."""
        path = f"{index.HOME}/directory.json"
        created = self._read_created(path)
        if created is not None:
            return created
        now = clock.time()
        if self._prepared:
            try:
                self.storage.write(path, f'{{"schema": {SCHEMA}, "created": {now!r}}}'.encode())
            except OSError:
                # Another writer may have put it there at this very moment.
                created = self._read_created(path)
                if created is None:
                    raise
                return created
        return now

    def _read_created(self, path: str) -> float | None:
        with contextlib.suppress(FileNotFoundError, RecordError):
            data = index.parse_json(index.read_bounded(self.storage, path), path)
            created = as_number(data.get("created")) if isinstance(data, dict) else None
            if created is not None and math.isfinite(created):
                return created
        return None

    # Before the first change

    def prepare(self) -> None:
        """Check that the storage can be written to, and sweep it; later calls do nothing."""
        if self._signed and self.transaction.trust is None:
            msg = (
                f"{self._signed} checkpoints in {self.storage} are signed, and what is written without the key would "
                "not be believed; pass trust= with their key, or open the directory without state= to look at it"
            )
            raise UntrustedError(msg)
        if not self._prepared and isinstance(self.storage, SupportsSweep):
            self.storage.prepare()
            self.transaction.sweep()
        self._prepared = True

    def begin(self) -> None:
        """Take over what belongs to this run, now that it is about to change something; later calls do nothing."""
        self.prepare()
        if self._begun:
            return
        others = len(self.manifest.records) - len(self.manifest.own)
        if others and not self.claimed:
            but = "" if self.policy.name.version_counter else ", unless their names are written again"
            msg = (
                f"{self.storage} holds {others} checkpoints of other runs; they are left alone{but}. "
                "To go on with a run call restore() first"
            )
            self.say_once("not empty", msg)
        self.claimed = self._on_line = True
        self._finish_left()
        self._settle_aliases(slots=True, claim=True)
        self._free_slot()
        self._begun = True

    def is_free(self, name: str) -> bool:
        """Return whether nothing on the storage has this name by now; if so it is remembered as taken."""
        if self.storage.list(name) or self.transaction.has_record(name):
            self.manifest = attrs.evolve(self.manifest, foreign=self.manifest.foreign | {name})
            return False
        return True

    def _finish_left(self) -> None:
        """Finish what an earlier process of this very run left half-way, on whatever host it ran."""
        left = []
        for listed in self._left:
            entry = self.transaction.refreshed(listed)
            if entry is None:
                continue
            record = entry.record
            if entry.status == "committed":
                known = self.manifest.by_name.get(record.name)
                if known is None or known.token != record.token:
                    self.manifest = self.manifest.with_record(record)
            elif (record.run, record.label) == (self.manifest.run, self.manifest.label) and not is_live(entry.owner):
                self.transaction.finish(entry, write=True)
            else:
                left.append(entry)
        self._left = left

    # Changes

    def note(self, metrics: Iterable[str]) -> None:
        """Remember which metrics were reported."""
        seen = self.manifest.seen.union(metrics)
        if seen != self.manifest.seen:
            self.manifest = attrs.evolve(self.manifest, seen=seen)

    def add(self, record: Record) -> None:
        """Take in a record that was committed."""
        self.manifest = self.manifest.with_record(record)
        self._aliases.forget(record.name)  # A slot has taken the alias's place.
        self._changed()

    def copy_in(self, record: Record, source: Storage, path: str, *, replaces: Record | None = None) -> Record:
        """Commit a copy of what lies at ``path`` of another storage, under its own name if that is free."""
        name = replaces.name if replaces else self.free_name(record)
        return self.transaction.copy_in(attrs.evolve(record, name=name), source, path, replaces=replaces)

    def rewrite(self, record: Record) -> None:
        """Change what a record says; its payload stays."""
        check_readable(record)
        self.prepare()
        self.transaction.put(Entry(record=record))
        self.add(record)

    def retire(self, *, spare: Container[str] = ()) -> list[Record]:
        """Remove what no rule keeps, and is not to be spared, and return it."""
        names = surplus(self.policy, self.manifest)
        unwanted = [self.manifest.by_name[name] for name in names if name not in spare]
        retired = [r for r in self.transaction.retire(unwanted) if r.name in self.manifest.by_name]
        # Payloads that would not go keep their names: a new checkpoint must not be taken for them.
        self.manifest = self.manifest.without(*(r.name for r in retired))
        if not self.manifest.foreign.issuperset(self.transaction.unfinished):
            foreign = self.manifest.foreign.union(self.transaction.unfinished)
            self.manifest = attrs.evolve(self.manifest, foreign=foreign)
        for _ in retired:
            self._changed()
        return retired

    def set_aside(self, record: Record) -> None:
        """Count a checkpoint that turned out to be bad no more, without touching it."""
        manifest = self.manifest.without(record.name)
        self.manifest = attrs.evolve(manifest, foreign=manifest.foreign | {record.name})

    def resume(self, record: Record, *, protect: bool) -> None:
        """Go on from this record; ``protect`` keeps it whatever the rules say. Writes nothing."""
        self._turn_to(attrs.evolve(self.manifest.resumed_at(record), resumed=record.name if protect else ""))

    def resume_run(self, run: str, line: Line, step: int, source: str = "") -> None:
        """Go on with a run whose host was at ``step`` of this line; ``source`` is kept. Writes nothing."""
        self._turn_to(attrs.evolve(self.manifest.resumed_from(run, line, step), resumed=source))

    def see(self, run: str, line: Line) -> None:
        """Be the directory of this run and line from now on, unless it is already. Writes nothing."""
        if (run, line) != (self.manifest.run, self.manifest.line):
            self._turn_to(self.manifest.seen_by(run, line))

    def _turn_to(self, manifest: Manifest) -> None:
        self.claimed = self._on_line = True
        self.manifest = manifest
        # Whose the aliases and slots are is another question now; it is settled before the next change.
        self._begun = False
        self._aliases.forget()
        self._settle_aliases(slots=True, claim=False)

    def close(self) -> None:
        """Write the index, give the aliases free, remove the staging area."""
        if self._prepared:
            with contextlib.suppress(OSError):
                self._write_index()
                self.transaction.release(self.policy.aliases)
                if isinstance(self.storage, SupportsSweep):
                    self.storage.close()

    # Aliases

    def point_aliases(self) -> None:
        """Let ``last`` and ``best`` name what they should, as the records have it."""
        self.manifest = self._aliases.point(self.policy, self.manifest)

    def _settle_aliases(self, *, slots: bool, claim: bool) -> None:
        self.policy = self._aliases.settle(self.manifest, self.say_once, slots=slots, claim=claim)

    def _free_slot(self) -> None:
        """Move a checkpoint that must stay out from under the alias, which is about to be written again."""
        slot = self.manifest.by_name.get(self.policy.name.last_file)
        if not self.policy.last or slot is None:
            return
        must_stay = slot.pinned or slot.name == self.manifest.resumed or not self.manifest.counts(slot)
        if must_stay or self.policy.last == "link":
            self.move_slot(slot)

    def own_name(self, record: Record, taken: Container[str] | None = None) -> str:
        """Return the name that the template gives a checkpoint, whatever alias it is written under now."""
        return own_name(self.policy, record, self.manifest, taken)

    def free_name(self, record: Record) -> str:
        """Return the record's name if it is free here, else one that its template gives it."""
        name = record.name
        is_taken = name in self.manifest.by_name or name in self.manifest.foreign or name in self.policy.aliases
        while is_taken or not self.is_free(name):
            name, is_taken = self.own_name(record), False
        return name

    def move_slot(self, slot: Record) -> Record:
        """Give a checkpoint that was written under the alias a name of its own."""
        while True:
            name = self.free_name(slot)
            try:
                moved = self.transaction.relocate(slot, name)
                break
            except NameTakenError:
                # Another manager was faster.
                self.manifest = attrs.evolve(self.manifest, foreign=self.manifest.foreign | {name})
        resumed = name if self.manifest.resumed == slot.name else self.manifest.resumed
        self.manifest = attrs.evolve(self.manifest.without(slot.name).with_record(moved), resumed=resumed)
        return moved

    def make_way(self, name: str, stem: str) -> str | None:
        """Rename whatever has the name, with its record if it has one; return its new name, None if nothing is there.

        Raises:
            StorageError: If the storage has no paths to rename.
        """
        record = self.manifest.by_name.get(name)
        if record is None and not self.storage.list(name):
            return None
        if not isinstance(self.storage, SupportsPaths):
            msg = f"{name} cannot be renamed: {self.storage} has no paths"
            raise StorageError(msg)
        self.prepare()
        new = self.policy.name.free_name(stem, self.manifest.taken.union(self.policy.aliases))
        while not self.is_free(new):
            new = self.policy.name.free_name(stem, self.manifest.taken.union(self.policy.aliases))
        if record is None:
            os.rename(self.storage.local_path(name), self.storage.local_path(new))
            # The folder that holds both is synced with the next record.
            self.manifest = attrs.evolve(self.manifest, foreign=(self.manifest.foreign - {name}) | {new})
            return new
        moved = self.transaction.move(record, new)
        resumed = new if self.manifest.resumed == name else self.manifest.resumed
        self.manifest = attrs.evolve(self.manifest.without(name).with_record(moved), resumed=resumed)
        self._aliases.forget()
        self._changed()
        return new

    # The index, and what is said once

    def _changed(self) -> None:
        self._unindexed += 1
        if self._unindexed >= max(INDEX_EVERY, len(self.manifest.records) // 10):
            with contextlib.suppress(OSError):
                self._write_index()

    def _write_index(self) -> None:
        if self._unindexed:
            index.save(self.storage, index.load(self.storage, self.transaction.trust))
            self._unindexed = 0

    def say_once(self, key: str, msg: str) -> None:
        """Warn, unless something was said under this key before."""
        if key not in self._said:
            self._said.add(key)
            warnings.warn(msg, CheckpointerWarning, stacklevel=4)

    def location(self, name: str) -> str:
        """Return the full path or URL of a payload."""
        if isinstance(self.storage, SupportsPaths):
            return self.storage.local_path(name)
        return f"{self.storage}/{name}"

    def address(self, name: str) -> str:
        """Return what a trainer opens a payload by: as `location`, but with the password of a URL."""
        return self.storage.url(name) if isinstance(self.storage, SupportsURLs) else self.location(name)


def _listing(storage: Storage, trust: HMACKey | None) -> index.Listing:
    try:
        return index.load(storage, trust)
    except StorageError:
        raise
    except OSError as error:
        msg = f"cannot use {storage}: {error}; check the path or URL, the credentials and the network"
        raise StorageError(msg) from error
