"""Removes the checkpoints that no rule keeps: for each one the payload first, then its record."""

from __future__ import annotations

from collections.abc import Iterable

from checkpointer.commit.journal import Journal
from checkpointer.errors import warn
from checkpointer.records.record import Record


def retire(journal: Journal, records: Iterable[Record], failed: set[str]) -> None:
    """Remove checkpoints that are announced as retired (step 8). Add a name to ``failed`` if that fails, and warn."""
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
