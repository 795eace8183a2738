"""Recovers from interrupted writes, and retires checkpoints, by the steps of `checkpointer.commit.transaction`."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping

import attrs

from checkpointer.commit.index import Listing
from checkpointer.commit.journal import Journal
from checkpointer.errors import CheckpointerWarning
from checkpointer.records.record import Entry, Record
from checkpointer.storage.digests import algorithm_of, digest_of, size_of
from checkpointer.storage.owner import is_dead

__all__ = ["Recovered", "finish", "recover", "remove", "retire", "settle"]


@attrs.frozen(kw_only=True)
class Recovered:
    """The checkpoints of a directory, by its record files."""

    records: tuple[Record, ...]
    """Committed records whose payload has the recorded size."""
    missing: tuple[Record, ...]
    """Committed records whose payload is gone, or has another size."""
    left: tuple[Entry, ...]
    """Unfinished entries."""


def recover(journal: Journal, listing: Listing, *, write: bool) -> Recovered:
    """Find the checkpoints of a directory; with ``write`` finish what ended writers left unfinished."""
    records: list[Record] = []
    left: list[Entry] = []
    for listed in listing.entries.values():
        is_left = listed.status != "committed" and write and is_dead(listed.owner)
        entry = journal.find(listed.record.name) if is_left else listed
        if entry is None:
            continue
        if entry.status == "committed":
            records.append(entry.record)
            continue
        can_finish = write and is_dead(entry.owner)
        records.extend(finish(journal, entry, write=can_finish))
        left.extend([] if can_finish else [entry])
    there, missing = _with_payload(journal, _without_moved(journal, records, write=write), listing.sizes)
    return Recovered(records=tuple(there), missing=tuple(missing), left=tuple(left))


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


def retire(journal: Journal, records: Iterable[Record]) -> list[Record]:
    """Remove checkpoints (step 7), and return those that are not listed any more. Failures warn and are retried."""
    retired = []
    for record in (*journal.unfinished.values(), *records):
        failed = "retired"
        try:
            journal.put(Entry(record=record, status="retired", owner=journal.owner))
            retired.append(record)
            journal.unfinished[record.name] = record
            failed = "deleted"
            remove(journal, record)
        except OSError as error:
            msg = f"{record.name} could not be {failed} ({error}); the next save tries again"
            warnings.warn(msg, CheckpointerWarning, stacklevel=2)
    return retired


def remove(journal: Journal, record: Record) -> None:
    """Delete a payload, then its record."""
    # If the size differs, the file is not our payload: another program has replaced it.
    if journal.has_payload(record):
        journal.storage.delete(record.name)
    journal.delete(record.name)
    journal.unfinished.pop(record.name, None)
