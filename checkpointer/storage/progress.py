"""How far a long transfer is: what logs it, and a storage that reports the bytes read from it."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, Final, cast

from checkpointer.ports import Clock, Stat, Storage, SupportsLinks, SupportsPaths, Upload
from checkpointer.storage.reader import SeekableReader

_log = logging.getLogger("checkpointer")

EVERY_S: Final = 10.0
"""Seconds between two lines in the log. A payload that is written in less time logs nothing."""


class Transfer:
    """Knows how much of a payload is written, and every `EVERY_S` logs it at INFO, with the speed.

    ``expected`` is the payload's size in bytes, or None if unknown. It is an estimate, unless the payload is a copy.
    """

    def __init__(self, name: str, clock: Clock, *, expected: int | None = None, is_copy: bool = False) -> None:
        self.name = name
        self._clock = clock
        self.expected = expected or 0
        self._of, self._verb = ("of", "copied") if is_copy else ("of about", "written")
        self.bytes = 0
        self._begun = self._logged = clock.time()

    def note(self, size: int) -> None:
        """Note that ``size`` bytes are written so far."""
        self.bytes = size
        now = self._clock.time()
        if now - self._logged >= EVERY_S:
            self._logged = now
            rate = self.bytes / (now - self._begun) / 1e6
            _log.info("%s: %s %s (%.3g MB/s)", self.name, self._amount(), self._verb, rate)

    def _amount(self) -> str:
        unit, size = ("GB", 1e9) if max(self.expected, self.bytes) >= 1e9 else ("MB", 1e6)
        done = f"{self.bytes / size:.1f}"
        if self.bytes > self.expected:  # The size is unknown, or the estimate was too low.
            return f"{done} {unit}"
        return f"{done} {self._of} {self.expected / size:.1f} {unit}"


class CountingStorage:
    """Another storage, which calls ``on_bytes`` with the number of bytes after each read.

    It supports paths and links if the other storage does, because a check for corruption uses them.
    """

    list: Callable[..., Mapping[str, Stat]]
    write: Callable[[str, bytes], None]
    delete: Callable[[str], None]
    upload: Callable[[str], Upload]

    def __init__(self, storage: Storage, on_bytes: Callable[[int], object]) -> None:
        self._storage = storage
        self._on_bytes = on_bytes
        # Set on the instance, because since Python 3.12 isinstance() with a Protocol does not call __getattr__.
        for port in (Storage, SupportsPaths, SupportsLinks):
            if isinstance(storage, port):
                names = [name for name in vars(port) if name != "open" and not name.startswith("_")]
                vars(self).update({name: getattr(storage, name) for name in names})

    def __str__(self) -> str:
        return str(self._storage)

    def open(self, path: str) -> BinaryIO:
        """See `Storage.open`."""
        return cast(BinaryIO, io.BufferedReader(_CountingReader(self._storage.open(path), self._on_bytes), 1 << 20))


class _CountingReader(SeekableReader):
    def __init__(self, stream: BinaryIO, on_bytes: Callable[[int], object]) -> None:
        self._stream = stream
        self._on_bytes = on_bytes

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def readinto(self, buffer: Any, /) -> int:
        chunk = self._stream.read(len(buffer))
        buffer[: len(chunk)] = chunk
        self._on_bytes(len(chunk))
        return len(chunk)

    def close(self) -> None:
        self._stream.close()
        super().close()
