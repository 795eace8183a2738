"""Says in a sentence which checkpoints lost payload or record, and what that means for the newest and the best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from checkpointer.policy.policy import Policy
from checkpointer.records.manifest import Manifest
from checkpointer.records.record import Record

__all__ = ["few_names", "missing_text"]

_FEW: Final = 3


def few_names(records: Sequence[Record]) -> str:
    """Return the names of the first few, and how many more there are."""
    more = f" and {len(records) - _FEW} more" if len(records) > _FEW else ""
    return ", ".join(record.name for record in records[:_FEW]) + more


def missing_text(
    policy: Policy, before: Manifest, now: Manifest, missing: Sequence[Record], unrecorded: Sequence[Record] = ()
) -> str:
    """Return what to say of checkpoints that do not count any more, at least one.

    Args:
        policy: Says which is the best.
        before: The records as if all payloads were there.
        now: The records whose payload is there.
        missing: The records whose payload is gone, or has another size.
        unrecorded: The records that were deleted, while their payload is there.
    """
    texts = []
    if missing:
        are, have, their, do = _agreeing(missing)
        texts += [f"{few_names(missing)} {are} gone, or {have} another size than {their}, and {do} not count"]
    if unrecorded:
        _, have, _, do = _agreeing(unrecorded)
        texts += [f"{few_names(unrecorded)} {have} no record any more, only a payload, and {do} not count"]
    tokens = {record.token for record in (*missing, *unrecorded)}
    pairs = {
        "newest": (before.newest, now.newest),
        "best": (policy.best_of(before.history), policy.best_of(now.history)),
    }
    for what, (was, is_now) in pairs.items():
        if was is not None and was.token in tokens:
            texts += [f"the {what} is {is_now.name} now, not {was.name}" if is_now else f"there is no {what} one now"]
    return "; ".join(texts)


def _agreeing(records: Sequence[Record]) -> tuple[str, str, str, str]:
    """Return the words of a sentence that agree with how many records it is about."""
    return ("is", "has", "its record says", "does") if len(records) == 1 else ("are", "have", "their records say", "do")
