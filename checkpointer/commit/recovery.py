"""Recovers from interrupted writes, and retires checkpoints, by the steps of `checkpointer.commit.transaction`."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping

import attrs

from checkpointer.commit.changes import Changes, changes_path, read_changes
from checkpointer.commit.index import Listing, record_path
from checkpointer.commit.journal import Journal
from checkpointer.errors import CheckpointerWarning, RecordError
from checkpointer.records.record import Entry, Record
from checkpointer.storage.digests import algorithm_of, digest_of, size_of
from checkpointer.storage.owner import is_dead

__all__ = ["Recovered", "finish", "finish_changes", "recover", "remove", "retire", "settle"]


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


def recover(journal: Journal, listing: Listing, *, write: bool) -> Recovered:
    """Find the checkpoints of a directory; with ``write`` finish what ended writers left unfinished."""
    entries = dict(listing.entries)
    overlaid: set[str] = set()
    for changes in listing.changes:
        if write and is_dead(changes.owner):
            finish_changes(journal, changes.owner, entries)
        else:
            overlaid |= _overlay(changes, entries)
    records: list[Record] = []
    left: list[Entry] = []
    for path, listed in entries.items():
        is_left = listed.status != "committed" and write and is_dead(listed.owner)
        entry = journal.find(listed.record.name) if is_left and path not in overlaid else listed
        if entry is None:
            continue
        if entry.status == "committed":
            records.append(entry.record)
            continue
        can_finish = write and is_dead(entry.owner) and path not in overlaid
        records.extend(finish(journal, entry, write=can_finish))
        left.extend([] if can_finish or path in overlaid else [entry])
    there, missing = _with_payload(journal, _without_moved(journal, records, write=write), listing.sizes)
    announced = tuple(entries[path] for path in overlaid)
    return Recovered(records=tuple(there), missing=tuple(missing), left=tuple(left), announced=announced)


def finish_changes(journal: Journal, owner: str, entries: dict[str, Entry]) -> None:
    """Finish the changes that an ended writer has announced; update the ``entries`` of a listing by path."""
    with contextlib.suppress(RecordError):
        changes = read_changes(journal.storage, changes_path(owner), journal.trust)
        for entry in changes.entries if changes is not None else ():
            there = journal.find(entry.record.name)
            if _applies(entry, there):
                finish(journal, entry, write=True)
            now, path = journal.find(entry.record.name), record_path(entry.record.name)
            entries.pop(path, None)
            entries |= {path: now} if now is not None else {}
        journal.storage.delete(changes_path(owner))


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


def _without_moved(journal: Journal, records: list[Record], *, write: bool) -> list[Record]:
    """Leave out the old name of a checkpoint if `Transaction.move` was interrupted after the rename."""
    twice = {token for token, count in Counter(r.token for r in records).items() if count > 1}
    there = {r.token for r in records if r.token in twice and journal.has_payload(r)}
    gone = [r for r in records if r.token in there and size_of(journal.storage, r.name, r.size) is None]
    for record in gone if write else ():
        journal.delete(record.name)
    return [record for record in records if record not in gone]


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

    With ``write`` the entry must have been read again, because other writers may have changed it.
    """
    if entry.status == "pending":
        settled = settle(journal, entry, write=write)
        return [settled] if settled else []
    if write and _is_payload_of(journal, entry.record):
        remove(journal, entry.record)
    elif write:
        journal.delete(entry.record.name)
    return []


def settle(journal: Journal, entry: Entry, *, write: bool) -> Record | None:
    """Return the record of a ``pending`` entry that the payload's digest proves; with ``write`` commit that record."""
    truth = entry.record if _is_payload_of(journal, entry.record) else entry.previous
    if write and truth is not None:
        journal.put(Entry(record=truth))
    elif write:
        journal.delete(entry.record.name)
    return truth


def _is_payload_of(journal: Journal, record: Record) -> bool:
    if not journal.has_payload(record):
        return False
    return digest_of(journal.storage, record.name, algorithm_of(record.digest)) == (record.size, record.digest)


def retire(journal: Journal, records: Iterable[Record], failed: set[str]) -> None:
    """Remove checkpoints that are announced as retired (step 7). Add a name to ``failed`` if that fails, and warn."""
    for record in records:
        try:
            remove(journal, record)
        except OSError as error:
            failed.add(record.name)
            msg = f"{record.name} could not be deleted ({error}); the next save tries again"
            warnings.warn(msg, CheckpointerWarning, stacklevel=2)


def remove(journal: Journal, record: Record) -> None:
    """Delete a payload, then its record."""
    # If the size differs, the file is not our payload: another program has replaced it.
    if journal.has_payload(record):
        journal.storage.delete(record.name)
    journal.delete(record.name)
