"""One run's view of one directory: its records, its aliases, and the unfinished writes of earlier processes."""

from __future__ import annotations

import contextlib
import math
import uuid
from collections.abc import Container, Iterable

import attrs

from checkpointer.clock import SystemClock
from checkpointer.commit import index
from checkpointer.commit.aliases import Aliases, release
from checkpointer.commit.contents import Contents
from checkpointer.commit.journal import Journal, aborting
from checkpointer.commit.lines import Lines
from checkpointer.commit.looks import Looks
from checkpointer.commit.naming import Names
from checkpointer.commit.recovery import finish, recover, retire
from checkpointer.commit.signing import HMACKey
from checkpointer.commit.transaction import Transaction
from checkpointer.commit.writer_marks import mark, unmark, writers_in
from checkpointer.errors import RecordError, StorageError
from checkpointer.policy.policy import Policy
from checkpointer.ports import Clock, Storage, SupportsSweep
from checkpointer.records.codec import as_number
from checkpointer.records.manifest import Manifest
from checkpointer.records.record import SCHEMA, Entry, Record, check_readable
from checkpointer.storage.opening import access_advice
from checkpointer.storage.owner import is_live

__all__ = ["Directory", "created"]

INDEX_EVERY = 64
"""The index is written again after this many changes, or a tenth of the records if that is more."""


class Directory:
    """Changes records and storage together, so that they agree.

    Args:
        storage: Where the files are.
        owner: Id of this writer.
        policy: The policy of the user. The attribute `policy` has alias names that are free.
        run: Id of the run to go on with; None starts a new one.
        label: Distinguishes managers that share the directory.
        writes: Whether to claim aliases now and finish the writes of ended writers. A reader changes nothing.
        trust: Signs each record; a record without its signature counts as damaged.
        clock: Decides when a transfer is slow enough to be logged.
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
        self.journal = journal = Journal(storage, owner, trust)
        listing = _listing(storage, trust)
        self.damaged = listing.damaged
        self.below = index.directories_below(listing.files, index.RECORDS)
        self._num_unindexed = listing.reads
        self.contents = contents = Contents(
            journal=journal,
            aliases=Aliases(journal, policy, listing),
            policy=policy,
            writers=writers_in(storage, listing.files),
            num_signed=sum(bool(entry.signature) for entry in listing.entries.values()),
            is_claimed=run is not None,
        )
        self.transaction = Transaction(journal, clock or SystemClock())
        self.looks = Looks(contents)
        self.names = Names(contents, self.looks, self.transaction)
        self.lines = Lines(contents, self.names)
        if writes:
            contents.prepare(marks=False)
        found = recover(journal, listing, write=writes)
        self._left = found.left
        known = (*found.records, *found.missing)
        unfinished = {entry.record.name for entry in found.left} - {record.name for record in known}
        manifest = Manifest(
            records=found.records,
            run=run or uuid.uuid4().hex[:12],
            label=label,
            foreign=listing.foreign | unfinished,
            seen=frozenset(metric for record in known for metric in record.metrics),
        )
        contents.manifest = manifest.without_payload(*found.missing, there=listing.sizes).on_newest_line(manifest.run)
        contents.settle_aliases(slots=False, claims=writes)
        contents.settle_aliases(claims=False)
        if writes:
            # Last, because on a full disk the alias files can be replaced, but the mark is a new file.
            mark(storage, owner)

    @property
    def manifest(self) -> Manifest:
        """The records as this run sees them."""
        return self.contents.manifest

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self.contents.policy

    def begin(self) -> None:
        """Take over the aliases and unfinished writes of this run before its first change; later calls do nothing."""
        contents = self.contents
        contents.prepare()
        if contents.is_begun:
            return
        others = len(self.manifest.records) - len(self.manifest.own)
        if others and not contents.is_claimed:
            but = "" if self.policy.name.version_counter else ", unless their names are written again"
            msg = (
                f"{self.storage} holds {others} checkpoints of other runs; they are left alone{but}. "
                "To go on with a run call restore() first"
            )
            contents.warn_once("not empty", msg)
        contents.is_claimed = contents.is_on_line = True
        self._left = tuple(entry for listed in self._left for entry in self._finish(listed))
        contents.settle_aliases(claims=True)
        self._free_slot()
        contents.is_begun = True

    def _finish(self, listed: Entry) -> list[Entry]:
        """Finish a write that an earlier process of this run left; return the entry if it belongs to others."""
        entry = self.journal.find(listed.record.name)
        if entry is None:
            return []
        record, manifest = entry.record, self.manifest
        if entry.status == "committed":
            known = manifest.by_name.get(record.name)
            if known is None or known.token != record.token:
                self.contents.manifest = manifest.with_record(record)
        elif (record.run, record.label) == (manifest.run, manifest.label) and not is_live(entry.owner):
            finish(self.journal, entry, write=True)
        else:
            return [entry]
        return []

    def _free_slot(self) -> None:
        """If a checkpoint under the alias must stay, give it another name before the alias is written."""
        slot = self.manifest.by_name.get(self.policy.name.last_file)
        if not self.policy.last or slot is None:
            return
        must_stay = slot.pinned or slot.name == self.manifest.resumed or not self.manifest.counts(slot)
        if must_stay or self.policy.last == "link":
            self.names.move_slot(slot)

    def note(self, metrics: Iterable[str]) -> None:
        """Remember which metrics were reported."""
        seen = self.manifest.seen.union(metrics)
        if seen != self.manifest.seen:
            self.contents.manifest = attrs.evolve(self.manifest, seen=seen)

    def add(self, record: Record) -> None:
        """Add a committed record."""
        self.contents.manifest = self.manifest.with_record(record)
        self.contents.aliases.forget(record.name)  # The record may be a slot, under the alias's name.
        self._count_changes(1)

    def copy_in(self, record: Record, source: Storage, path: str, *, replaces: Record | None = None) -> Record:
        """Copy in the payload at ``path`` of another storage, under its own name if that is free."""
        name = replaces.name if replaces else self.names.free(record)
        copy = self.transaction.copy_in(attrs.evolve(record, name=name), source, path, replaces=replaces)
        self.add(copy)
        return copy

    def rewrite(self, record: Record) -> None:
        """Replace a record; its payload stays."""
        check_readable(record)
        self.contents.prepare()
        self.journal.put(Entry(record=record))
        self.add(record)

    def retire(self, *, spare: Container[str] = ()) -> list[Record]:
        """Remove the checkpoints that no rule keeps, without those to ``spare``, and return them."""
        unwanted = [self.manifest.by_name[name] for name in self.looks.reasons.surplus if name not in spare]
        retired = [r for r in retire(self.journal, unwanted) if r.name in self.manifest.by_name]
        self.contents.manifest = self.manifest.without(*(r.name for r in retired))
        # If a payload could not be deleted, its name stays taken: a new checkpoint must not be mistaken for it.
        self.contents.add_foreign(*self.journal.unfinished)
        self._count_changes(len(retired))
        return retired

    def disown(self, record: Record) -> None:
        """Remove a record whose payload was replaced by another file; the name stays taken."""
        self.journal.delete(record.name)
        self.contents.manifest = self.manifest.without(record.name)
        self.contents.add_foreign(record.name)

    def point_aliases(self) -> None:
        """Point ``last`` and ``best`` to their checkpoints."""
        self.contents.manifest = self.contents.aliases.point(self.policy, self.manifest)

    def close(self) -> None:
        """Write the index, release the aliases, remove this writer's mark and its staging folder."""
        if not self.contents.is_prepared:
            return
        with contextlib.suppress(OSError):
            self._write_index()
            release(self.journal, self.policy.aliases)
        unmark(self.storage, self.journal.owner)
        with contextlib.suppress(OSError):
            if isinstance(self.storage, SupportsSweep):
                self.storage.close()

    def _count_changes(self, changes: int) -> None:
        self._num_unindexed += changes
        if self._num_unindexed >= max(INDEX_EVERY, len(self.manifest.records) // 10):
            with contextlib.suppress(OSError):
                self._write_index()

    def _write_index(self) -> None:
        if self._num_unindexed:
            index.save(self.storage, index.load(self.storage, self.journal.trust))
            self._num_unindexed = 0


def created(directory: Directory, clock: Clock) -> float:
    """Return the time from which a time trigger counts if nothing was ever saved: the start of the first writer."""
    storage, path = directory.storage, f"{index.HOME}/directory.json"
    found = _read_created(storage, path)
    if found is not None or not directory.contents.is_prepared:
        return clock.time() if found is None else found
    now = clock.time()
    data = f'{{"schema": {SCHEMA}, "created": {now!r}}}'.encode()
    try:
        with aborting(storage.upload(path)) as upload:
            upload.write(data)
            upload.finish()
            upload.publish(replace=False)
    except OSError as error:
        # Another writer may have created it at this very moment.
        found = _read_created(storage, path)
        if found is not None:
            return found
        if not isinstance(error, FileExistsError):
            raise
        storage.write(path, data)  # The file is damaged.
    return now


def _read_created(storage: Storage, path: str) -> float | None:
    with contextlib.suppress(FileNotFoundError, RecordError):
        data = index.parse_json(index.read_bounded(storage, path), path)
        found = as_number(data.get("created")) if isinstance(data, dict) else None
        if found is not None and math.isfinite(found):
            return found
    return None


def _listing(storage: Storage, trust: HMACKey | None) -> index.Listing:
    try:
        return index.load(storage, trust)
    except StorageError:
        raise
    except OSError as error:
        msg = f"cannot use {storage}: {error}; {access_advice(storage, error)}"
        raise StorageError(msg) from error
