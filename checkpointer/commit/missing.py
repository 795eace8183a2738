"""Says in a sentence which checkpoints have no payload any more, and what that means for the newest and the best."""

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


def missing_text(policy: Policy, before: Manifest, now: Manifest, missing: Sequence[Record]) -> str:
    """Return what to say of payloads that are gone.

    Args:
        policy: Says which is the best.
        before: The records as if all payloads were there.
        now: The records whose payload is there.
        missing: The records whose payload is gone, or has another size; at least one.
    """
    is_one = len(missing) == 1
    text = (
        f"{few_names(missing)} {'is' if is_one else 'are'} gone, or {'has' if is_one else 'have'} another size than "
        f"{'its record says' if is_one else 'their records say'}, and {'does' if is_one else 'do'} not count"
    )
    tokens = {record.token for record in missing}
    pairs = {
        "newest": (before.newest, now.newest),
        "best": (policy.best_of(before.history), policy.best_of(now.history)),
    }
    for what, (was, is_now) in pairs.items():
        if was is not None and was.token in tokens:
            text += f"; the {what} is {is_now.name} now, not {was.name}" if is_now else f"; there is no {what} one now"
    return text
