"""Removes what dead writers left unfinished, and nothing else."""

from __future__ import annotations

import attrs

from checkpointer.commit.changes import changes_in, read_changes
from checkpointer.commit.journal import Journal
from checkpointer.commit.recovery import finish, finish_changes
from checkpointer.commit.signing import HMACKey, refuse_unsigned
from checkpointer.commit.writer_marks import clear_ended, describe, writers_in
from checkpointer.ports import Storage, SupportsSweep
from checkpointer.storage.owner import is_dead, is_live
from checkpointer.tools.catalog import look_at

__all__ = ["Swept", "sweep"]


@attrs.frozen(kw_only=True)
class Swept:
    """The result of a sweep."""

    staged: int
    """Unfinished writes that were removed."""
    finished: tuple[str, ...]
    """Checkpoints whose write or removal was brought to its end."""
    left: tuple[str, ...]
    """Those that stay half-way, because their writer is running or is on another machine."""
    writers: tuple[str, ...] = ()
    """Processes that write to the directory, or may do so on another machine."""


def sweep(storage: Storage, owner: str, trust: HMACKey | None = None, *, force: bool = False) -> Swept:
    """Remove what writers that are provably dead left unfinished, and finish what they had begun.

    Args:
        storage: The directory.
        owner: Id of this writer.
        trust: The key of signed records.
        force: Count writers on other machines as dead too. The caller knows that they have ended.

    Raises:
        UntrustedError: If records are signed, and there is no key.
    """
    before = look_at(storage, trust)
    refuse_unsigned(before.signed, before.place, trust)
    journal = Journal(storage, owner, trust)
    staged = 0
    if isinstance(storage, SupportsSweep):
        storage.prepare()
        staged = storage.sweep()
    left = []
    finished = []
    for listed in before.unfinished:
        entry = journal.find(listed.record.name)
        if entry is None or entry.status == "committed":
            continue  # Its writer has finished it meanwhile.
        if is_dead(entry.owner) or (force and not is_live(entry.owner)):
            finish(journal, entry, write=True)
            finished.append(entry.record.name)
        else:
            left.append(entry.record.name)
    for path in changes_in(before.files):
        changes = read_changes(storage, path, trust)
        if changes is not None and (is_dead(changes.owner) or (force and not is_live(changes.owner))):
            finish_changes(journal, changes.owner)
            finished += changes.names
        else:
            left += changes.names if changes is not None else ()
    writers = clear_ended(storage, writers_in(storage, before.files), force=force)
    if isinstance(storage, SupportsSweep):
        storage.close()
    return Swept(
        staged=staged, finished=tuple(finished), left=tuple(left), writers=tuple(describe(other) for other in writers)
    )
