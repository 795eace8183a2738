"""Warnings about a loop that cannot use what it is given: a policy, a report, or batches."""

from __future__ import annotations

import math

from checkpointer import Decision, Progress, Skip
from checkpointer.policy.triggers import Trigger, horizon_of
from checkpointer_torch.training_state import LoopProgress

__all__ = ["batches_left_over", "batches_unseen", "report_unused", "why_silent"]


def why_silent(when: Trigger, decision: Decision) -> str:
    """Return why nothing is saved in a loop without epochs, after the newest decision; empty if the policy can save.

    Example:
        >>> from checkpointer import EveryEpochs, EverySteps
        >>> why_silent(EveryEpochs(1), Skip(reason="not due")).partition(" (")[0]
        'no epoch has ended, but the policy saves at the end of epochs alone'
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


def report_unused(epoch: int) -> str:
    """Return the warning about a report after the last batch that is followed by another step."""
    return (
        f"a report in epoch {epoch} was followed by another step, and was not used: take the batches from "
        "loop.batches(), or pass the metrics to step()"
    )


def batches_unseen(progress: LoopProgress) -> str:
    """Return the warning about a resumed epoch that does not take its batches from the loop."""
    return (
        f"{progress.source} was saved after batch {progress.batch} of epoch {progress.epoch}, and this step's batch "
        "did not come from loop.batches(): those batches are trained again. Iterate over loop.batches(loader) instead "
        "of the loader"
    )


def batches_left_over(epoch: int, count: int) -> str:
    """Return the warning about an epoch that is saved with gradients of batches that are in no step."""
    return (
        f"epoch {epoch} ended {count} batches after its last step(), and a checkpoint does not hold the gradients of "
        "those: a resume from here loses them. Update with what is left at the end of an epoch and call step(), or let "
        "an epoch be a multiple of the batches of a step (limit=)"
    )
