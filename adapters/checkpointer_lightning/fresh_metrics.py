"""Which metrics of a Trainer were measured at its step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class FreshMetrics:
    """Remembers the step at which each metric was measured: a Trainer returns old values until new ones replace them.

    Two measurements may give equal numbers, so numbers are not compared: a new measurement is a new tensor.
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[Any, int]] = {}
        self._step = -1
        self._ranked: dict[str, Any] = {}
        """The metrics that the step was ranked by."""

    def at(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Return the metrics that were measured at ``step``, which is the training's step now."""
        if step != self._step:
            self._step, self._ranked = step, {}
        for name, value in metrics.items():
            seen = self._seen.get(name)
            if seen is None or not _is_same(seen[0], value):
                self._seen[name] = value, step
        return {name: value for name, value in metrics.items() if self._seen[name][1] == step}

    def rank(self, metrics: Mapping[str, Any]) -> None:
        """Remember the metrics that the step was ranked by."""
        self._ranked.update(metrics)

    def as_ranked(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Return the metrics, with the values that the step was ranked by if it was ranked.

        With ``on_step=True, on_epoch=True`` a Trainer shows a batch's value first. At the end of the epoch it shows the
        mean of all batches under the same name: another quantity, which does not measure the step's weights.
        """
        return {name: self._ranked.get(name, value) for name, value in metrics.items()}


def _is_same(old: Any, new: Any) -> bool:
    """Return whether two tensors are one measurement: the Trainer returns views of one memory."""
    if old is new:
        return True
    try:
        return bool(old.data_ptr() == new.data_ptr())
    except (AttributeError, RuntimeError):  # Not a tensor, or one without memory of its own.
        return False
