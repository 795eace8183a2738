"""The bytes of streams and tensors, in memory."""

from __future__ import annotations

import ctypes
from typing import Any, BinaryIO, Final

from checkpointer.errors import CorruptError

_CHUNK_BYTES: Final = 8 << 20


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
    array = (ctypes.c_ubyte * size).from_address(address)
    array.owner = owner  # type: ignore[attr-defined]
    return memoryview(array).cast("B")
