"""What a loop knows of the weights that a schedule-free optimizer swaps: see `checkpointer.policy.swapped_weights`."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from checkpointer import CheckpointerWarning
from checkpointer.policy.swapped_weights import OTHER, modes_of, trains, unranked

__all__ = ["Swapping"]


class Swapping:
    """Knows which weights the model has now, and which the last state had that was taken or put back.

    Args:
        objects: What the training consists of; optimizers with a ``train_mode`` are schedule-free.
    """

    def __init__(self, objects: Iterable[Any]) -> None:
        self._optimizers = [thing for thing in objects if modes_of(thing)]
        self._noted: tuple[int, bool] | None = None
        self._has_warned = False

    def note(self, step: int) -> None:
        """Remember which weights the state of a step has that is taken, or was put back."""
        self._noted = step, trains(self._optimizers)

    def told_apart(self, metrics: Mapping[str, Any], reported: Collection[str], *, step: int) -> Mapping[str, Any]:
        """Return metrics for the checkpoint of a step: what was measured of other weights gets a name of its own.

        Args:
            metrics: What was measured at this step.
            reported: Which of them a validation measured, so with the weights of ``optimizer.eval()``.
            step: The step. If its state was taken already, what that state has counts.
        """
        has_training = trains(self._optimizers) or (step, True) == self._noted
        if not reported or (step, False) == self._noted or not has_training:
            return metrics
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(unranked(reported, step), CheckpointerWarning, stacklevel=4)
        return {f"{name}{OTHER}" if name in reported else name: value for name, value in metrics.items()}
