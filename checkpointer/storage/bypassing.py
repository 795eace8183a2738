"""A file written past the page cache: that costs less of the processor, and nothing cached makes way for it."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from typing import Any, BinaryIO, Final, cast

__all__ = ["open_payload"]

BLOCK: Final = 4 << 20
"""Bytes that are written at once, and how many a file must have for it: a multiple of what any disk asks for."""

_ALIGNED: Final = 4096
_DIRECT: Final[int] = getattr(os, "O_DIRECT", 0)


def open_payload(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for writing anew, front to back.

    What cannot be written past the cache is written through it: on a filesystem that is no local disk or refuses it,
    files of less than `BLOCK`, and the end of each.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
    return cast(BinaryIO, _Writer(os.open(path, flags, 0o666)))


class _Writer:
    """Gathers what is written in one aligned block of memory."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._memory = mmap.mmap(-1, BLOCK)
        self._block = memoryview(self._memory)
        self._filled = 0
        # A device of its own: not a network's, whose writes would each be waited for, nor one in memory.
        self._may_bypass = bool(_DIRECT) and os.major(os.fstat(descriptor).st_dev) != 0
        self._bypasses = False
        self.closed = False

    def write(self, data: Any) -> int:
        """Append all of ``data`` (bytes-like) and return its length in bytes."""
        view = memoryview(data).cast("B")
        start = 0
        while start < len(view):
            part = view[start : start + BLOCK - self._filled]
            self._block[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            start += len(part)
            if self._filled == BLOCK:
                self._put()
        return len(view)

    def flush(self) -> None:
        """Hand what was gathered to the system."""
        if self._filled:
            self._may_bypass = False  # What comes next begins in the middle of a block.
            self._put()

    def _put(self) -> None:
        rest = self._block[: self._filled]
        while rest:
            self._turn(to=self._may_bypass)
            try:
                written = os.write(self._descriptor, rest)
            except OSError as error:
                if not self._bypasses or error.errno != errno.EINVAL:
                    raise
                self._may_bypass = False
                continue
            rest = rest[written:]
            self._may_bypass = self._may_bypass and written % _ALIGNED == 0
        self._filled = 0

    def _turn(self, *, to: bool) -> None:
        """Begin, or cease, to write past the cache."""
        if to == self._bypasses:
            return
        import fcntl

        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | _DIRECT if to else flags & ~_DIRECT)
        except OSError:
            if not to:
                raise
            self._may_bypass = False
        else:
            self._bypasses = to

    def fileno(self) -> int:
        """Return the file's descriptor."""
        return self._descriptor

    def close(self) -> None:
        """Write the rest and close; a second call does nothing."""
        if self.closed:
            return
        self.closed = True
        try:
            self.flush()
        finally:
            self._block.release()
            with contextlib.suppress(BufferError):
                self._memory.close()
            os.close(self._descriptor)
