"""Clears away what dead writers left unfinished, and nothing else."""

from __future__ import annotations

import attrs

from checkpointer.inspecting import look_at
from checkpointer.owner import is_dead
from checkpointer.ports import Storage, SupportsSweep
from checkpointer.transaction import Transaction
from checkpointer.trust import HMACKey, refuse_unsigned

__all__ = ["Swept", "sweep"]


@attrs.frozen(kw_only=True)
class Swept:
    """What was cleared away."""

    staged: int
    """Unfinished writes that were removed."""
    finished: tuple[str, ...]
    """Checkpoints whose write or removal was brought to its end."""
    left: tuple[str, ...]
    """Those that stay half-way, since their writer lives or is on another machine."""


def sweep(storage: Storage, owner: str, trust: HMACKey | None = None) -> Swept:
    """Remove what writers that are provably dead left unfinished, and finish what they had begun.

    Args:
        storage: The directory.
        owner: Id of this writer.
        trust: The key of signed records.

    Raises:
        UntrustedError: If records are signed, and there is no key.

    Example:
        >>> from checkpointer.testing import MemoryStorage
        >>> sweep(MemoryStorage(), "me")
        Swept(staged=0, finished=(), left=())
    """
    before = look_at(storage, trust)
    refuse_unsigned(before.signed, before.place, trust)
    transaction = Transaction(storage, owner, trust)
    staged = 0
    if isinstance(storage, SupportsSweep):
        storage.prepare()
        staged = transaction.sweep()
    left = []
    finished = []
    for listed in before.unfinished:
        entry = transaction.refreshed(listed)
        if entry is None or entry.status == "committed":
            continue  # Its writer has finished it meanwhile.
        if is_dead(entry.owner):
            transaction.finish(entry, write=True)
            finished.append(entry.record.name)
        else:
            left.append(entry.record.name)
    if isinstance(storage, SupportsSweep):
        storage.close()
    return Swept(staged=staged, finished=tuple(finished), left=tuple(left))
