"""Lets the kernel write a file to the disk while the file is still being written."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any, Final, cast

WRITE_BACK: Final = 8 << 20
"""After so many bytes the kernel is asked to begin writing them to the disk."""
_SYNC_FILE_RANGE_WRITE: Final = 2


def begin_write_back(descriptor: int, offset: int, size: int) -> None:
    """Ask the kernel to begin writing a range of a file to the disk, so that less is left for `os.fsync`.

    It is a hint: it waits for nothing and promises nothing. If the disk fails, `os.fsync` raises the error.
    """
    if (call := _sync_file_range()) is not None:
        call(descriptor, offset, size, _SYNC_FILE_RANGE_WRITE)


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """Return Linux's system call of this name; None on other systems."""
    if sys.platform != "linux":
        return None
    try:
        call: Any = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):  # A C library without it.
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return cast("Callable[[int, int, int, int], int]", call)
