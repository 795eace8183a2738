"""The system's time. If the system clock is set, running triggers are not affected."""

from __future__ import annotations

import time


class SystemClock:
    """The wall time at construction, plus the time that a monotonic clock has measured since then."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def time(self) -> float:
        """Return seconds since the Unix epoch."""
        return self._offset + time.monotonic()
