"""A schedule-free optimizer has two sets of weights; a checkpoint is ranked by what was measured of the set it has."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from checkpointer import CheckpointerWarning

__all__ = ["Swapping"]


class Swapping:
    """Knows which weights the model has now, and which the last state had that was taken or put back.

    Args:
        objects: What the training consists of; optimizers with a ``train_mode`` are schedule-free.
    """

    def __init__(self, objects: Iterable[Any]) -> None:
        self._optimizers = [thing for thing in objects if _modes(thing)]
        self._noted: tuple[int, bool] | None = None
        self._has_warned = False

    @property
    def _is_training(self) -> bool:
        return any(any(_modes(optimizer)) for optimizer in self._optimizers)

    def note(self, step: int) -> None:
        """Remember which weights the state of a step has that is taken, or was put back."""
        self._noted = step, self._is_training

    def told_apart(self, metrics: Mapping[str, Any], reported: Collection[str], *, step: int) -> Mapping[str, Any]:
        """Return metrics for the checkpoint of a step: what was measured of other weights gets a name of its own.

        Args:
            metrics: What was measured at this step.
            reported: Which of them a validation measured, so with the weights of ``optimizer.eval()``.
            step: The step. If its state was taken already, what that state has counts.
        """
        if not reported or (step, False) == self._noted or not (self._is_training or (step, True) == self._noted):
            return metrics
        if not self._has_warned:
            self._has_warned = True
            msg = (
                f"{', '.join(sorted(reported))} does not rank the checkpoint of step {step}, which has the training "
                "weights of a schedule-free optimizer; a validation measures those of optimizer.eval(). Let the save "
                "come between optimizer.eval() and optimizer.train(): see 'Averaged weights' in docs/loops.md"
            )
            warnings.warn(msg, CheckpointerWarning, stacklevel=4)
        return {f"{name} (other weights)" if name in reported else name: value for name, value in metrics.items()}


def _modes(thing: Any) -> list[bool]:
    """Return the modes of a schedule-free optimizer, True for training; nothing for anything else."""
    groups = getattr(thing, "param_groups", [])
    modes = [getattr(thing, "train_mode", None), *(group.get("train_mode") for group in groups)]
    return [mode for mode in modes if groups and isinstance(mode, bool)]
