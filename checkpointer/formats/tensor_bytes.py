"""The bytes of streams and tensors, in memory."""

from __future__ import annotations

import collections
import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, Final

from checkpointer._parallel import ahead
from checkpointer.errors import CorruptError

_CHUNK_BYTES: Final = 8 << 20
_LARGE: Final = 4 << 20
_PIECE: Final = 8 << 20


def read_exactly(stream: BinaryIO, size: int, name: str) -> bytearray:
    """Return the next ``size`` bytes. A remote stream would hold them twice if it were asked for all at once."""
    data = bytearray(size)
    view = memoryview(data)
    done = 0
    while done < size:
        chunk = stream.read(min(size - done, _CHUNK_BYTES))
        if not chunk:
            msg = f"the file ends within {name}"
            raise CorruptError(msg)
        view[done : done + len(chunk)] = chunk
        done += len(chunk)
    return data


def memory_of(tensor: Any) -> memoryview:
    """Return the elements of a dense tensor as bytes. No copy is made if it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return memory_at(flat.data_ptr(), flat.numel() * flat.element_size(), flat)


def memory_at(address: int, size: int, owner: Any = None) -> memoryview:
    """Return bytes in memory; ``owner`` is kept as long as they are. torch can be installed without numpy."""
    if not size:
        return memoryview(b"")
    if owner is None:
        return _view(address, size, _WRITE)
    array = (ctypes.c_ubyte * size).from_address(address)
    array.owner = owner  # type: ignore[attr-defined]
    return memoryview(array).cast("B")


_WRITE: Final = 0x200
_view: Final[Callable[[int, int, int], memoryview]] = ctypes.PYFUNCTYPE(
    ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int
)(("PyMemoryView_FromMemory", ctypes.pythonapi))
"""Makes a view of memory. ctypes would need a new type for each size, which takes 0.1 ms."""


Move = tuple[int, int, int]
"""Address of the target, address of the source, bytes."""


def move(moves: Sequence[Move], owners: object) -> None:
    """Copy bytes, large copies on as many threads as there are cores. Each takes the next piece when it has done one.

    torch gives each of its threads the same share of a tensor, and waits for all of them after each tensor. If another
    program uses one of the cores, that takes several times as long as one thread takes.

    Args:
        moves: What to copy.
        owners: Objects that own this memory. If a second Ctrl-C interrupts the wait for a thread, the thread finishes
            its piece after this function has ended. It holds the owners, so the memory is not freed before.
    """
    large = []
    for target, source, size in moves:
        if size >= _LARGE:
            large += [(target + n, source + n, min(_PIECE, size - n)) for n in range(0, size, _PIECE)]
        else:
            _move_with_gil(target, source, size)
    collections.deque(ahead(functools.partial(_move_piece, large, owners), len(large)), maxlen=0)


def _move_piece(pieces: Sequence[Move], owners: object, number: int) -> None:
    ctypes.memmove(*pieces[number])


_move_with_gil: Final = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0
)
"""`ctypes.memmove` gives up the GIL. If another thread computes in Python, it takes 5 ms to get it back."""
