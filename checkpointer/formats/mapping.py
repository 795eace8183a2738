"""A file that is mapped into memory, and whose pages are brought there by the system, with errors as errors."""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import sys
from collections.abc import Callable
from typing import Any, BinaryIO, Final

from checkpointer.formats.memory import memory_at

_POPULATE_READ: Final = 22
"""``MADV_POPULATE_READ`` of Linux 5.14: what would be a SIGBUS at an access is an error of this call instead."""


class MappedFile:
    """The pages of a file, as they are now. If they are changed in memory, the file stays as it is."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        import torch

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


@functools.cache
def _populate() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux") or not os.path.exists("/proc/self/fd"):
        return None
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    with mmap.mmap(-1, mmap.PAGESIZE) as probe:
        page = ctypes.c_char.from_buffer(probe)
        is_known = madvise(ctypes.addressof(page), mmap.PAGESIZE, _POPULATE_READ) == 0
        del page
    return madvise if is_known else None
