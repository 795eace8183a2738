"""Removes what dead writers left unfinished, and nothing else."""

from __future__ import annotations

import contextlib

import attrs

from checkpointer.commit.changes import CHANGES, changes_path
from checkpointer.commit.index import load
from checkpointer.commit.journal import Journal, holding
from checkpointer.commit.lease import Lease
from checkpointer.commit.recovery import finish_left
from checkpointer.commit.signing import HMACKey, refuse_unsigned
from checkpointer.commit.terms import TERMS, TermFiles, key_of, read_claim
from checkpointer.commit.writer_marks import clear_ended, describe, writers_in
from checkpointer.errors import ConflictError
from checkpointer.ports import Storage, SupportsSweep
from checkpointer.storage.owner import is_live
from checkpointer.tools.catalog import Catalog, look_at


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
    left: set[str] = set()
    finished: set[str] = set()
    lease = Lease(takeover=True) if force else None
    runs = [(entry.record.run, entry.record.label) for entry in before.unfinished]
    for run in dict.fromkeys([*runs, *_held_elsewhere(before)] if force else runs):
        names = {entry.record.name for entry in before.unfinished if (entry.record.run, entry.record.label) == run}
        done: frozenset[str] = frozenset()
        with contextlib.suppress(ConflictError), holding(journal, *run, lease):
            done = finish_left(journal, load(storage, trust), run, force=force)
        finished |= done
        left |= {name for name in names - done if (entry := journal.find(name)) and entry.status != "committed"}
    listing = load(storage, trust)
    left |= {str(error) for path, error in listing.damaged.items() if path.startswith(f"{CHANGES}/")}
    for changes in listing.changes:
        if not changes.entries and journal.has_stopped(changes.owner, force=force):
            storage.delete(changes_path(changes.owner))
        else:
            left |= changes.names
    writers = clear_ended(storage, writers_in(storage, before.files), force=force)
    if isinstance(storage, SupportsSweep):
        storage.close()
    return Swept(
        staged=staged,
        finished=tuple(sorted(finished)),
        left=tuple(sorted(left)),
        writers=tuple(describe(other) for other in writers),
    )


def _held_elsewhere(catalog: Catalog) -> list[tuple[str, str]]:
    """Return the runs that a process on another machine may train. A run has no record before its first save."""
    runs = []
    for key, paths in catalog.terms.items():
        found = TermFiles.of(paths, key)
        if found.highest and found.highest not in found.ended:
            claim = read_claim(catalog.storage, f"{TERMS}/{key}", found.highest, catalog.trust)
            is_of_run = key == key_of(claim.run, claim.label)
            runs += [(claim.run, claim.label)] if is_of_run and not is_live(claim.owner) else []
    return runs
