"""Reasons why a policy saves nothing in a loop that has no epochs."""

from __future__ import annotations

import math

from checkpointer import Decision, Skip
from checkpointer.policy.triggers import Trigger, horizon_of
from checkpointer.records.record import Progress

__all__ = ["why_silent"]


def why_silent(when: Trigger, decision: Decision) -> str:
    """Return why nothing is saved, to follow "and"; empty if the policy can save.

    Args:
        when: The policy's trigger.
        decision: The decision on the newest step.

    Example:
        >>> from checkpointer import EveryEpochs, EverySteps
        >>> why_silent(EveryEpochs(1), Skip(reason="not due")).partition(":")[0]
        'no epoch has ended, but the policy saves at the end of epochs alone (save every epoch)'
        >>> why_silent(EverySteps(1), Skip(reason="not due"))
        ''
    """
    horizon = horizon_of(when, Progress())
    if horizon.epochs < math.inf and horizon.step == horizon.time == math.inf:
        return (
            f"no epoch has ended, but the policy saves at the end of epochs alone (save {when}): use EverySteps(n), "
            "take the epochs from loop.epochs(), or call loop.end_epoch()"
        )
    if isinstance(decision, Skip) and decision.waiting:
        return f"nothing is saved: {decision.reason}; pass the metric to loop.step() or loop.report()"
    return ""
