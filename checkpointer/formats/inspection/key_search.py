"""Counts the steps in which Python finds a place for each key of a dict or set.

Whole numbers are their own hashes. So a file can have numbers that Python tries to put into the same places, each after
all that came before it. Then a few megabytes take hours.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

MANY: Final = 4096
"""A container with fewer keys takes little time, whatever they are."""
_SHIFT: Final = 5
_NEIGHBOURS: Final = 9
"""A set looks at so many places side by side."""
_BITS_64: Final = (1 << 64) - 1
_LARGE_SET: Final = 50_000


class KeySearch:
    """The places of a container's keys, as CPython chooses them by their hashes.

    Example:
        >>> search = KeySearch({number: None for number in range(5000)})
        >>> search.steps, search.add(hash(5000))
        (0, 0)
    """

    def __init__(self, container: Collection[Any]) -> None:
        self.container: Final = container
        """It is kept, so that no other object gets its id."""
        self._is_set = isinstance(container, set)
        self._hashes: list[int] = []
        self._places = bytearray(8)
        self.steps = sum(self.add(hash(key)) for key in container)
        """How many places were taken already when the keys so far were added."""

    def add(self, value: int) -> int:
        """Add a key by its hash, and return the number of steps."""
        self._hashes.append(value)
        used, size = len(self._hashes), len(self._places)
        if self._is_set:
            least = 0 if used * 5 < (size - 1) * 3 else used * (2 if used > _LARGE_SET else 4) + 1
        else:
            least = 0 if used <= size * 2 // 3 else size * 2
        if not least:
            return self._put(value)
        self._places = bytearray(1 << max(3, (least - 1).bit_length()))
        return sum(map(self._put, self._hashes))

    def _put(self, value: int) -> int:
        places, steps = self._places, 0
        mask, rest = len(places) - 1, value & _BITS_64
        at = rest & mask
        while True:
            last = at + _NEIGHBOURS if self._is_set and at + _NEIGHBOURS <= mask else at
            free = places.find(0, at, last + 1)
            if free >= 0:
                places[free] = 1
                return steps + free - at
            steps += last + 1 - at
            rest >>= _SHIFT
            at = (at * 5 + rest + 1) & mask
