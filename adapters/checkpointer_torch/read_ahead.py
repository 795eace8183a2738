"""The batches that a wrapper of a ``DataLoader`` has read, and not yet given: the random states before each read."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, Final

from checkpointer_torch.random_state import plain_random_state, put_random_state, raw_random_state

_MOST: Final = 64
"""A wrapper that is further ahead than so many batches is not exact."""


class ReadAhead:
    """Counts the reads of a pass, and remembers the random states before the last of them.

    Data that draws random numbers draws them in the order of the reads. After a resume the batches that were read and
    not given are read again, each with the random numbers it had; then those of the boundary go on.
    """

    def __init__(self, iterator: Any, count: int, replayed: Iterable[Mapping[str, Any]]) -> None:
        """Watch the iterator of a ``DataLoader`` without workers.

        Args:
            iterator: What ``DataLoader._get_iterator`` has made.
            count: Batches that were left out.
            replayed: The random states before the reads that come again.
        """
        self._count = count
        self._before: deque[Any] = deque(maxlen=_MOST)
        self._replayed = deque(replayed)
        self._now = raw_random_state()
        self._read = iterator._next_data
        iterator._next_data = self._next_data

    def _next_data(self) -> Any:
        is_replayed = bool(self._replayed)
        if is_replayed:
            put_random_state(self._replayed.popleft())
        before = raw_random_state()
        batch = self._read()
        self._count += 1
        self._before.append(before)
        if is_replayed and not self._replayed:
            put_random_state(plain_random_state(self._now))
        return batch

    def take(self, given: int) -> list[Mapping[str, Any]]:
        """Return the random states before each read after the first ``given`` ones."""
        ahead = max(self._count - given, 0)
        return [plain_random_state(before) for before in list(self._before)[len(self._before) - ahead :]]
