"""Counts the work of reading a file, so that a small file cannot stand for a huge one."""

from __future__ import annotations

from typing import Final

import attrs

from checkpointer.errors import CorruptError

PER_BYTE: Final = 32
"""Units of work for each byte of a pickle. The files of trainers need at most a third of it."""
AT_LEAST: Final = 4_000_000
"""Units that a pickle of any size may need."""
ENTRY: Final = 128
"""Units of an entry that gets a name. Each character of the name and of a text under it takes one more."""
COPY: Final = 32
"""Units of an item that is copied or hashed."""
STEP: Final = 2
"""Units of a step in the search for the place of a key; see `checkpointer.formats.inspection.key_search`."""


@attrs.define
class Work:
    """How much more may be done: looking at an item of a container takes one unit, as does a character of a text."""

    left: int

    @classmethod
    def for_bytes(cls, size: int) -> Work:
        """Return what a pickle of this size (bytes) may need."""
        return cls(AT_LEAST + PER_BYTE * size)

    def spend(self, units: int) -> None:
        """Raise `CorruptError` if more is needed than the size of the file allows."""
        self.left -= units
        if self.left < 0:
            msg = "it stands for far more entries than its size allows; the file of a checkpoint never does"
            raise CorruptError(msg)
