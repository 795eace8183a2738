"""A clock that moves only when a test calls `FakeClock.advance`."""

from __future__ import annotations


class FakeClock:
    """A clock for tests of time triggers, without sleeping.

    Args:
        time: The time at the start, in seconds since the Unix epoch.

    Example:
        >>> from checkpointer.testing import FakeClock
        >>> clock = FakeClock(time=100.0)
        >>> clock.advance(30)
        >>> clock.time()
        130.0
    """

    def __init__(self, time: float = 0.0) -> None:
        self._now = float(time)

    def time(self) -> float:
        """Return seconds since the Unix epoch."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Move the clock forward.

        Args:
            seconds: By how much, at least 0.

        Raises:
            ValueError: If ``seconds`` is negative: a `checkpointer.ports.Clock` does not go back.
        """
        if not seconds >= 0:
            msg = f"cannot advance by {seconds!r} s: a clock does not go back; pass at least 0, or make a new FakeClock"
            raise ValueError(msg)
        self._now += seconds
