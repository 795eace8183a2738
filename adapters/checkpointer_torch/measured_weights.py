"""The weights that a metric was measured with, for optimizers that swap them: schedule-free ones."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from checkpointer.errors import warn
from checkpointer.policy.swapped_weights import OTHER, modes_of, trains, unranked


class MeasuredWeights:
    """Knows which weights of a schedule-free optimizer the model has now, and which the last state had.

    See `checkpointer.policy.swapped_weights`.
    """

    def __init__(self, objects: Iterable[Any]) -> None:
        self._optimizers = [thing for thing in objects if modes_of(thing)]
        self._noted: tuple[int, bool] | None = None
        self._has_warned = False

    def note(self, step: int) -> None:
        """Remember which weights the state of a step has, when it is taken or put back."""
        self._noted = step, trains(self._optimizers)

    def rename(self, metrics: Mapping[str, Any], reported: Collection[str], *, step: int) -> Mapping[str, Any]:
        """Return metrics for the checkpoint of a step; a metric of other weights gets a name of its own.

        A validation measured the ``reported`` ones, so with the weights of ``optimizer.eval()``. If the state of the
        step was taken already, the weights of that state count.
        """
        has_training = trains(self._optimizers) or (step, True) == self._noted
        if not reported or (step, False) == self._noted or not has_training:
            return metrics
        if not self._has_warned:
            self._has_warned = True
            warn(unranked(reported, step))
        return {f"{name}{OTHER}" if name in reported else name: value for name, value in metrics.items()}
