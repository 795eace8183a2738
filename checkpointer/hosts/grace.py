"""The seconds between a signal to stop and the kill that follows it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

import attrs

__all__ = ["CLOSE_S", "Grace"]

CLOSE_S: Final = 600.0
"""Seconds that the end of a training waits for the mirror at most."""


@attrs.define
class Grace:
    """How long a training may still wait, once a signal to stop has come.

    Example:
        >>> grace = Grace(30.0, clock=lambda: 100.0)
        >>> grace.left
        600.0
        >>> grace.begin()
        >>> grace.left
        30.0
    """

    seconds: float = math.inf
    """Seconds from the signal to the kill; infinite if that is not known."""
    clock: Callable[[], float] = attrs.field(default=time.monotonic, kw_only=True)
    _since: float | None = attrs.field(default=None, init=False)

    def begin(self) -> None:
        """Count from now on; a second call does nothing."""
        self._since = self.clock() if self._since is None else self._since

    @property
    def left(self) -> float:
        """Seconds that closing may take."""
        if self._since is None:
            return CLOSE_S
        return max(0.0, min(CLOSE_S, self.seconds - (self.clock() - self._since)))
