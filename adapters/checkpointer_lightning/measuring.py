"""Which metrics were measured at this step: a Trainer shows old ones until new ones take their place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["Measured"]


class Measured:
    """Remembers at which step each metric was first seen with the value it has.

    Equal numbers may be measured twice, so it is not the number that tells: a new measurement is a new tensor.
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[Any, int]] = {}

    def at(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of the metrics that were measured at ``step``, the step the training is at."""
        for name, value in metrics.items():
            seen = self._seen.get(name)
            if seen is None or not _is_same(seen[0], value):
                self._seen[name] = value, step
        return {name: value for name, value in metrics.items() if self._seen[name][1] == step}


def _is_same(old: Any, new: Any) -> bool:
    """Return whether two tensors are one measurement: the Trainer hands out views of one memory."""
    if old is new:
        return True
    try:
        return bool(old.data_ptr() == new.data_ptr())
    except (AttributeError, RuntimeError):  # Not a tensor, or one without memory of its own.
        return False
