"""Removes checkpoints, and recovers from interrupted writes, by the steps of `checkpointer.commit.transaction`."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import attrs

from checkpointer.commit.changes import Changes, changes_path
from checkpointer.commit.index import Listing, load, record_path
from checkpointer.commit.journal import Journal, holding
from checkpointer.commit.killed_saves import announced_by_others, has_named_files, is_replaced, remove_files
from checkpointer.commit.signing import HMACKey
from checkpointer.errors import warn
from checkpointer.ports import Storage
from checkpointer.records.manifest import Limits
from checkpointer.records.record import Entry, Record
from checkpointer.storage.digests import algorithm_of, digest_of, size_of
from checkpointer.storage.owner import temporary_owner


def retire(journal: Journal, records: Iterable[Record], failed: set[str]) -> None:
    """Remove checkpoints that are announced as retired (step 8). Add to ``failed`` what fails, and warn."""
    for record in records:
        try:
            remove(journal, record)
        except OSError as error:
            failed.add(record.name)
            msg = f"{record.name} could not be deleted ({error}); the next save tries again"
            warn(msg)


def remove(journal: Journal, record: Record) -> None:
    """Delete a payload, then its record."""
    # If the size differs, the file is not our payload: another program has replaced it.
    if journal.has_payload(record):
        journal.storage.delete(record.name)
    journal.delete(record.name)


@attrs.frozen(kw_only=True)
class Recovered:
    """The checkpoints of a directory, by its record files."""

    records: tuple[Record, ...]
    """Committed records whose payload has the recorded size."""
    missing: tuple[Record, ...]
    """Committed records whose payload is gone, or has another size."""
    left: tuple[Entry, ...]
    """Unfinished entries."""
    announced: tuple[Entry, ...] = ()
    """Changes of existing records that other writers have announced, and may not have finished."""


def recover(journal: Journal, listing: Listing, *, run: tuple[str, str] | None = None) -> Recovered:
    """Find the checkpoints of a directory; finish what ended writers of one ``run`` and label left unfinished.

    The journal must hold the term of that run, so that only one process finishes its writes.
    """
    entries = dict(listing.entries)
    for name in finish_left(journal, listing, run):
        now = journal.find(name)
        entries.pop(record_path(name), None)
        entries |= {record_path(name): now} if now is not None else {}
    announced = [one for one in listing.changes if not (journal.has_stopped(one.owner) and _is_of(run, *one.entries))]
    return _seen(journal, entries, announced, listing.sizes, listing.limits)


def finish_left(
    journal: Journal, listing: Listing, run: tuple[str, str] | None, *, force: bool = False
) -> frozenset[str]:
    """Finish what ended writers of a run left, and return the names; ``force`` counts unknown writers as ended."""
    ours = [one for one in listing.changes if journal.has_stopped(one.owner, force=force) and _is_of(run, *one.entries)]
    entries = [entry for entry in listing.entries.values() if _is_of(run, entry)]
    unsure = announced_by_others(journal, listing.changes, force=force)

    def can_finish(entry: Entry) -> bool:
        if entry.status == "committed" or entry.record.name in unsure:
            return False
        return journal.has_stopped(entry.owner, force=force) or is_replaced(journal, entry)

    left = [one for one in entries if can_finish(one)]
    # A pending record without a payload may be that of a live writer, which is about to write the payload.
    kept = {one.record.name for one in entries if one.status != "committed"}
    records = [entry.record for entry in entries if entry.status != "retired"]
    moved = [record for record in _moved(journal, records) if record.name not in kept]
    names = {entry.record.name for entry in left}.union(*(one.names for one in ours), (r.name for r in moved))
    with journal.changing(aliases=names):
        for changes in ours:
            finish_changes(journal, changes)
        for listed in left:
            entry = journal.find(listed.record.name)
            if entry is None or not can_finish(entry):
                continue
            record, storage = entry.record, journal.storage
            if entry.status == "pending" and has_named_files(storage, record) and not is_payload_of(journal, record):
                remove_files(storage, record)
            if journal.has_stopped(entry.owner, force=force):
                finish(journal, entry, write=True)
        for record in moved:
            journal.delete(record.name)
    return frozenset(names)


def _is_of(run: tuple[str, str] | None, *entries: Entry) -> bool:
    return run is not None and all((entry.record.run, entry.record.label) == run for entry in entries)


def _seen(
    journal: Journal,
    entries: dict[str, Entry],
    announced: Iterable[Changes],
    sizes: Mapping[str, int],
    limits: Limits,
) -> Recovered:
    """Return what the entries of a directory say, with the changes that other writers have announced."""
    # A writer that was replaced may announce a change of what its successor is changing. It finds out then, and does
    # not make it. So the highest term comes first, and a later announcement of the same record does not apply.
    by_term = sorted(announced, key=lambda changes: -changes.term)
    overlaid: set[str] = set().union(*(_overlay(changes, entries) for changes in by_term))
    records: list[Record] = []
    left: list[Entry] = []
    for path, entry in entries.items():
        if entry.status == "committed":
            records.append(entry.record)
            continue
        if path in overlaid or not _is_late(entry.record, limits):
            records.extend(finish(journal, entry, write=False))
        left.extend([] if path in overlaid else [entry])
    gone = _moved(journal, records)
    # A process that took over has given a checkpoint another name, and the writer before may restore the old record.
    terms: dict[str, int] = {}
    for record in records:
        terms[record.token] = max(record.term, terms.get(record.token, 0))
    records = [record for record in records if record not in gone and record.term == terms[record.token]]
    there, missing = _with_payload(journal, records, sizes)
    waiting = tuple(entries[path] for path in overlaid)
    return Recovered(records=tuple(there), missing=tuple(missing), left=tuple(left), announced=waiting)


def _is_late(record: Record, limits: Limits) -> bool:
    """Return whether another process has taken over the run while this record was pending. It did not count it."""
    return any(record.term < term for term, _ in limits.get((record.run, record.label), ()))


def finish_run(storage: Storage, trust: HMACKey | None, run: tuple[str, str]) -> None:
    """Hold a run, and finish what its ended writers left.

    Raises:
        RunInUseError: If a process trains the run.
    """
    with temporary_owner() as owner:
        journal = Journal(storage, owner, trust)
        with holding(journal, *run):
            recover(journal, load(storage, trust), run=run)
        storage.delete(changes_path(owner))


def finish_changes(journal: Journal, changes: Changes) -> None:
    """Finish the changes that an ended writer has announced. What it announced too late, it has not begun."""
    for entry in changes.entries:
        if _applies(entry, journal.find(entry.record.name)):
            finish(journal, entry, write=True)
    journal.storage.delete(changes_path(changes.owner))


def _overlay(changes: Changes, entries: dict[str, Entry]) -> set[str]:
    """Let what a writer has announced count instead of the records; return the paths of these records."""
    announced = {record_path(entry.record.name): attrs.evolve(entry, owner=changes.owner) for entry in changes.entries}
    applied = {path: entry for path, entry in announced.items() if _applies(entry, entries.get(path))}
    entries |= applied
    return set(applied)


def _applies(entry: Entry, there: Entry | None) -> bool:
    """Return whether an announced change of the record that is ``there`` is not finished."""
    if there is None:
        return entry.status == "pending" and entry.previous is None
    before = entry.record if entry.status == "retired" else entry.previous
    return there.status == "committed" and before is not None and there.record.token == before.token


def _moved(journal: Journal, records: Sequence[Record]) -> list[Record]:
    """Return the old record of each checkpoint for which `Names.make_way` was interrupted after the rename."""
    twice = {token for token, count in Counter(r.token for r in records).items() if count > 1}
    there = {r.token for r in records if r.token in twice and journal.has_payload(r)}
    return [r for r in records if r.token in there and size_of(journal.storage, r.name, r.size) is None]


def _with_payload(
    journal: Journal, listed: Iterable[Record], sizes: Mapping[str, int]
) -> tuple[list[Record], list[Record]]:
    """Return the records whose payload has the recorded size, and the other ones."""
    there: list[Record] = []
    missing: list[Record] = []
    for record in listed:
        if sizes.get(record.name) == record.size or journal.has_payload(record):
            there.append(record)
        # A live writer may have replaced or retired it since the listing.
        elif (entry := journal.find(record.name)) is not None:
            for found in [entry.record] if entry.status == "committed" else finish(journal, entry, write=False):
                (there if journal.has_payload(found) else missing).append(found)
    return there, missing


def finish(journal: Journal, entry: Entry, *, write: bool) -> list[Record]:
    """Finish an interrupted entry, and return the committed record that results, if one does.

    With ``write`` the entry must have been read again, because other writers may have changed it. Then a retired
    checkpoint whose payload is whole counts again: an alias may still lead to it. The next save retires it.
    """
    if entry.status == "retired" and not write:
        return []  # A live writer may remove it at any moment.
    settled = settle(journal, entry, write=write)
    return [settled] if settled else []


def settle(journal: Journal, entry: Entry, *, write: bool) -> Record | None:
    """Return the record of an entry that the payload's digest proves; with ``write`` commit that record."""
    truth = entry.record if is_payload_of(journal, entry.record) else entry.previous
    if write and truth is not None:
        journal.put(Entry(record=truth))
    elif write:
        journal.delete(entry.record.name)
    return truth


def is_payload_of(journal: Journal, record: Record) -> bool:
    """Return whether the payload of this name has the size and digest of the record. Reads all of it."""
    with contextlib.suppress(FileNotFoundError):  # A live writer may delete it at any moment.
        if journal.has_payload(record):
            found = digest_of(journal.storage, record.name, algorithm_of(record.digest))
            return found == (record.size, record.digest)
    return False
