"""The seconds between a signal to stop and the kill that follows it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import attrs


@attrs.define
class Grace:
    """How long a training may still wait, once a signal to stop has come.

    Example:
        >>> grace = Grace(30.0, clock=iter([90.0, 100.0]).__next__)
        >>> grace.left is None
        True
        >>> grace.begin()
        >>> grace.left
        20.0
    """

    seconds: float = math.inf
    """Seconds from the signal to the kill; infinite if that is not known."""
    clock: Callable[[], float] = attrs.field(default=time.monotonic, kw_only=True)
    _since: float | None = attrs.field(default=None, init=False)

    def begin(self) -> None:
        """Count from now on; a second call does nothing."""
        if self._since is None:
            self._since = self.clock()

    @property
    def left(self) -> float | None:
        """Seconds that closing may take; None if nothing bounds it."""
        if self._since is None or math.isinf(self.seconds):
            return None
        return max(0.0, self.seconds - (self.clock() - self._since))
