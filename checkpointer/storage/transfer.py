"""Says how far a payload is that takes long to write."""

from __future__ import annotations

import logging
from typing import Any, Final

from checkpointer.ports import Clock, Writable

__all__ = ["EVERY_S", "Transfer"]

_log = logging.getLogger("checkpointer")

EVERY_S: Final = 10.0
"""Seconds between two lines; a payload that is written in less says nothing."""


class Transfer:
    """Passes bytes on, and logs at INFO how many have gone and how quickly, every `EVERY_S`.

    Args:
        stream: Where to.
        name: What the log calls it.
        clock: Measures how long it takes.
        verb: What is done with the bytes, such as ``written``.
        of: How many bytes there will be in all, in words, such as ``of about``, and the number; None if unknown.

    Example:
        >>> import io
        >>> from checkpointer.testing import FakeClock
        >>> transfer = Transfer(io.BytesIO(), "a.ckpt", FakeClock())
        >>> transfer.write(b"data")
        4
    """

    def __init__(
        self, stream: Writable, name: str, clock: Clock, *, verb: str = "written", of: tuple[str, int] | None = None
    ) -> None:
        self._stream = stream
        self._name = name
        self._clock = clock
        self._verb = verb
        self._of = of
        self._bytes = 0
        self._begun = self._said = clock.time()

    def write(self, data: Any) -> int:
        """Write all of ``data`` and return its length in bytes."""
        count = self._stream.write(data)
        self._bytes += count
        now = self._clock.time()
        if now - self._said >= EVERY_S:
            self._said = now
            rate = self._bytes / (now - self._begun) / 1e6
            _log.info("%s: %s %s (%.3g MB/s)", self._name, self._amount(), self._verb, rate)
        return count

    def _amount(self) -> str:
        word, total = self._of or ("", 0)
        unit, size = ("GB", 1e9) if max(total, self._bytes) >= 1e9 else ("MB", 1e6)
        done = f"{self._bytes / size:.1f}"
        # One that has outgrown the last is about no size that is known.
        return f"{done} {word} {total / size:.1f} {unit}" if total >= self._bytes else f"{done} {unit}"
