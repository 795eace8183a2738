"""Memory for snapshots that the writer process can read too: a file without a name, which exists in memory only.

The file ends with the last process that has it open. It needs neither ``/dev/shm`` nor a name that could be left over.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Sequence
from typing import Any, Final

MIN_SHARED: Final = 64 << 20
"""Bytes of a state from which on its snapshot lies in shared memory. Below it a second process has nothing to gain."""
LARGE: Final = 1 << 16
"""Buffers of at least so many bytes begin at a block, so that the disk can read them from where they are."""
BLOCK: Final = 4096
"""Bytes of which memory, offset and size have to be multiples for a direct write. Pages may be larger."""
_SMALL_ALIGNMENT: Final = 64
_STEP: Final = 64 << 20
_SPARE: Final = 16
"""A state that has grown once may grow by one part of so many before it needs new memory."""

_all: Final = weakref.WeakValueDictionary[int, "Arena"]()
"""By descriptor. It needs no lock, which a fork could leave locked in the child."""


class Arena:
    """Shared memory that is cut into buffers. In a forked child it belongs to the parent.

    Args:
        size: Bytes. All of them are allocated at once, because a process that touches a page for which there is no
            memory is ended by a signal.

    Raises:
        OSError: If the system has no such memory, or not enough.
    """

    def __init__(self, size: int) -> None:
        import torch

        self.descriptor = os.memfd_create("checkpointer-snapshot", os.MFD_CLOEXEC)
        self._size = size
        self._pid = os.getpid()
        try:
            # In steps, because the kernel begins a step anew after each signal, such as that of a profiler.
            for start in range(0, size, _STEP):
                os.posix_fallocate(self.descriptor, start, min(_STEP, size - start))
            flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
            self._map = _Map(self.descriptor, size, flags=flags)
        except BaseException:
            os.close(self.descriptor)
            raise
        weakref.finalize(self._map, _free, self.descriptor, self._pid).atexit = False
        self._address = torch.frombuffer(self._map, dtype=torch.uint8).data_ptr()
        _all[self.descriptor] = self

    @property
    def is_here(self) -> bool:
        """Whether this process has made it."""
        return os.getpid() == self._pid

    def suits(self, sizes: Sequence[int]) -> bool:
        """Return whether buffers of these sizes fit, and need at least half of it."""
        needed = _layout(sizes)[1]
        return self.is_here and needed <= self._size <= 2 * needed

    def buffers(self, sizes: Sequence[int]) -> list[Any]:
        """Return a storage for each number of bytes. Those of an earlier call must not be used any more."""
        import torch

        return [
            torch.frombuffer(self._map, dtype=torch.uint8, offset=start, count=count).untyped_storage()
            if count
            else torch.empty(0, dtype=torch.uint8).untyped_storage()
            for start, count in zip(_layout(sizes)[0], sizes, strict=True)
        ]

    def offset_of(self, address: int, size: int) -> int | None:
        """Return where a piece of memory lies in the file; None if it lies elsewhere."""
        offset = address - self._address
        return offset if 0 <= offset and offset + size <= self._size else None


class _Map(mmap.mmap):
    """A map that can have a finalizer. All buffers keep it."""


def _free(descriptor: int, owner: int) -> None:
    """Free the memory, although the writer process may still have it open. A forked child must not do that."""
    if os.getpid() == owner:
        os.ftruncate(descriptor, 0)
    os.close(descriptor)


def arena_for(sizes: Sequence[int], *, has_changed: bool) -> Arena | None:
    """Return shared memory for buffers of these sizes, or None: for a small state, or where there is none.

    If the sizes have changed, it has room to grow.
    """
    size = _layout(sizes)[1]
    if size < MIN_SHARED or not is_possible():
        return None
    try:
        return Arena(size + size // _SPARE if has_changed else size)
    except OSError:
        return None


def is_possible() -> bool:
    """Return whether this system has such memory, and a second core on which another process can work."""
    return hasattr(os, "memfd_create") and hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) > 1


def arenas() -> list[Arena]:
    """Return all that this process has made and that still exist."""
    arenas = [reference() for reference in _all.valuerefs()]
    return [arena for arena in arenas if arena is not None and arena.is_here]


def _layout(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Return where each buffer begins, and the bytes of all."""
    starts, end = [], 0
    for size in sizes:
        alignment = BLOCK if size >= LARGE else _SMALL_ALIGNMENT
        end += -end % alignment
        starts.append(end)
        end += size
    return starts, end
