"""The system's time, steady while the process lives: a clock that is set does not move a running trigger."""

from __future__ import annotations

import time

__all__ = ["SystemClock"]


class SystemClock:
    """Wall time when it was made, plus what a monotonic clock has counted since."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def time(self) -> float:
        """Return seconds since the Unix epoch."""
        return self._offset + time.monotonic()
