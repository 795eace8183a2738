"""Pages of memory: those of a file, which the system reads with errors as errors, and huge ones."""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import sys
from collections.abc import Callable
from typing import Any, BinaryIO, Final

import torch

from checkpointer.formats.tensor_bytes import memory_at

HUGE_PAGE: Final = 2 << 20
"""Bytes of a huge page of most processors. On others nothing depends on it."""
_POPULATE_READ: Final = 22
"""``MADV_POPULATE_READ`` of Linux 5.14: what would be a SIGBUS at an access is an error of this call instead."""


class MappedFile:
    """The pages of a file, as they are now. If they are changed in memory, the file stays as it is."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        # By the descriptor, because another file may have the name by now.
        self.storage: Any = torch.UntypedStorage.from_file(f"/proc/self/fd/{stream.fileno()}", False, size)
        """All of its bytes, as torch has them."""
        self._address = self.storage.data_ptr()
        self.memory: Final = memory_at(self._address, size, self.storage)
        """All of its bytes."""

    def populate(self, start: int, length: int) -> None:
        """Bring pages into memory, so that reading them cannot fail.

        Raises:
            OSError: If the disk cannot read them, or the file is shorter now.
        """
        populate = _populate()
        assert populate is not None, "can_map() says so"
        begin = start - start % mmap.PAGESIZE
        if populate(self._address + begin, start + length - begin, _POPULATE_READ):
            code = ctypes.get_errno()
            msg = f"bytes {start} to {start + length} of the mapped file cannot be read, or it is shorter now"
            raise OSError(errno.EIO if code == errno.EFAULT else code, msg)


def can_map() -> bool:
    """Return whether this system can read the pages of a mapped file ahead, with errors as errors."""
    return _populate() is not None


def use_huge_pages(address: int, size: int) -> None:
    """Ask the system for huge pages in memory that was not written yet, because each first write to a page costs time.

    It is a hint: systems without them, or without enough free memory, ignore it.
    """
    begin, end = -(-address // HUGE_PAGE) * HUGE_PAGE, (address + size) // HUGE_PAGE * HUGE_PAGE
    advise, hint = _madvise(), getattr(mmap, "MADV_HUGEPAGE", None)
    if advise is not None and hint is not None and begin < end:
        advise(begin, end - begin, hint)


@functools.cache
def _populate() -> Callable[[int, int, int], int] | None:
    advise = _madvise()
    if advise is None or not os.path.exists("/proc/self/fd"):
        return None
    with mmap.mmap(-1, mmap.PAGESIZE) as probe:
        page = ctypes.c_char.from_buffer(probe)
        is_known = advise(ctypes.addressof(page), mmap.PAGESIZE, _POPULATE_READ) == 0
        del page
    return advise if is_known else None


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return advise
