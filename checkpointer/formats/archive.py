"""Writes the bytes of a torch file: the zip file that `torch.save` writes, in one pass over the tensors' memory.

`torch.save` pickles a state, and gives each record to a writer in C++. That writer reads a tensor once for its CRC32,
and once more to write it. `Archive` has the methods of that writer. It takes the CRC32 of a chunk, and gives the chunk
to the stream while it is in the processor's cache.
"""

from __future__ import annotations

import functools
import io
import math
import pickle
import re
import struct
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import xxhash

from checkpointer.errors import SaveError
from checkpointer.formats.tensor_bytes import memory_at

if TYPE_CHECKING:  # The writer process needs nothing else of it.
    from checkpointer.ports import Writable

CHUNK: Final = 4 << 20
"""Bytes that are given to the stream at a time. They fit the processor's cache."""

LARGE: Final = 1 << 20
"""Records of at least so many bytes can begin at a page of the file."""
_SMALL: Final = 1 << 16
"""Pieces below this many bytes are joined, because each write has a cost of its own."""

_LOCAL: Final = struct.Struct("<4s5H3L2H")
_CENTRAL: Final = struct.Struct("<4s6H3L5H2L")
_END_64: Final = struct.Struct("<4sQ2H2L4Q")
_END_64_LOCATOR: Final = struct.Struct("<4sLQL")
_END: Final = struct.Struct("<4s4H2LH")
_UTF8: Final = 1 << 11
_HAS_DESCRIPTOR: Final = 1 << 3
_LIMIT: Final = 0xFFFFFFFF
"""Sizes and offsets from this one on are written as 64 bits."""
_MAX_PADDING: Final = 1 << 15
"""An extra field has less than 64 kB."""
_VERSION: Final = "3\n"
_MASK: Final = (1 << 64) - 1

try:
    from zlib_ng.zlib_ng import crc32 as _crc32
except ImportError:  # It is five times as fast as Python's own, and has no wheels for rare platforms.
    _crc32 = zlib.crc32


def _refuse_left_out(name: str, size: int) -> None:
    """Raise `SaveError`, because a record would have no bytes."""
    msg = f"torch.serialization.skip_data is active, so {name} ({size} bytes) would be left out; save outside of it"
    raise SaveError(msg)


class Archive:
    """A zip file that is written front to back. `torch.serialization._save` writes its records.

    Args:
        stream: Gets the bytes, in chunks of at most `CHUNK`.
        alignment: Each record begins at a multiple of so many bytes, so that it can be mapped into memory.
        has_crc32: Without it, each record has the CRC32 0, as after ``torch.serialization.set_crc32_options(False)``.
        large_alignment: That of records of at least `LARGE` bytes, if it is possible with ``alignment``.
    """

    def __init__(
        self, stream: Writable, *, alignment: int = 64, has_crc32: bool = True, large_alignment: int = 0
    ) -> None:
        self._stream = stream
        self._alignment = alignment
        both = math.lcm(alignment, large_alignment or 1)
        self._large_alignment = both if both <= _MAX_PADDING else alignment
        self._crc32: Callable[[Any, int], int] = _crc32 if has_crc32 else lambda data, value: 0
        self._pending = bytearray()
        self._position = 0
        self._directory = bytearray()
        self._count = 0
        self._names = xxhash.xxh3_64()
        self._contents = 0

    def write_record(self, name: str, data: Any, size: int) -> None:
        """Write a record: text, bytes, a view of memory, or a storage in the memory of the CPU."""
        path = f"archive/{name}".encode()
        start, wide = self._position, size >= _LIMIT or self._position >= _LIMIT
        flags = _UTF8 | (_HAS_DESCRIPTOR if size else 0)
        extra = _wide(start, size, 0) if wide else b""
        alignment = self._large_alignment if size >= LARGE else self._alignment
        extra += _padding(start + _LOCAL.size + len(path) + len(extra), alignment)
        self._put(_LOCAL.pack(b"PK\3\4", 0, flags, 0, 0, 0, 0, 0, 0, len(path), len(extra)) + path + extra)
        is_shared = not isinstance(data, (str, bytes, memoryview)) and data.is_shared()
        crc = self._put_all(memory(data, size), is_shared=is_shared)
        if size:
            self._put(struct.pack("<4sL2Q" if wide else "<4s3L", b"PK\7\b", crc, size, size))
        extra = _wide(start, size, size) if wide else b""
        few, at = min(size, _LIMIT), min(start, _LIMIT)
        fixed = (0, 0, flags, 0, 0, 0, crc, few, few, len(path), len(extra), 0, 0, 0, 0, at)
        self._directory += _CENTRAL.pack(b"PK\1\2", *fixed) + path + extra
        self._count += 1
        self._names.update(path + b"\0")
        # As torch combines them: a fingerprint of all records before this one.
        seed = self._contents
        self._contents = seed ^ ((crc + 0x9E3779B9 + (seed << 6) + (seed >> 2)) & _MASK)

    write_record_metadata = staticmethod(_refuse_left_out)

    def close(self, identity: str = "") -> None:
        """Write what follows the last record. ``identity`` takes the place of the file's fingerprint."""
        self.write_record("version", _VERSION, len(_VERSION))
        identity = identity or f"{self._names.intdigest():020}{self._contents:020}"
        self.write_record(".data/serialization_id", identity, len(identity))
        start, size, end = self._position, len(self._directory), self._position + len(self._directory)
        self._put(self._directory)
        count = self._count
        self._put(_END_64.pack(b"PK\6\6", _END_64.size - 12, 0x31E, 45, 0, 0, count, count, size, start))
        self._put(_END_64_LOCATOR.pack(b"PK\6\7", 0, end, 1))
        few = min(count, 0xFFFF)
        self._put(_END.pack(b"PK\5\6", 0, 0, few, few, min(size, _LIMIT), min(start, _LIMIT), 0))
        self._flush()

    def _put_all(self, data: memoryview, *, is_shared: bool) -> int:
        """Write a record's bytes and return their CRC32. Bytes that other processes may change are copied before."""
        crc, done = 0, 0
        while done < len(data):
            # The chunks end at multiples of their size in the file.
            chunk = data[done : done + CHUNK - self._position % CHUNK]
            chunk = memoryview(bytes(chunk)) if is_shared else chunk
            crc = self._crc32(chunk, crc)
            self._put(chunk)
            done += len(chunk)
        return crc

    def _put(self, data: bytes | bytearray | memoryview) -> None:
        self._position += len(data)
        if len(data) < _SMALL:
            self._pending += data
            if len(self._pending) >= CHUNK - _SMALL:
                self._flush()
            return
        self._flush()
        self._stream.write(data)

    def _flush(self) -> None:
        if self._pending:
            self._stream.write(self._pending)
            self._pending = bytearray()


class _Records(list[tuple[str, Any, int]]):
    """Takes the place of an `Archive`, and keeps its records."""

    def write_record(self, name: str, data: Any, size: int) -> None:
        self.append((name, data, size))

    write_record_metadata = staticmethod(_refuse_left_out)


def plan(state: Any, pickle_module: Any) -> tuple[list[tuple[str, Any, int]], int, bool]:
    """Return what `save` would write; only after `is_like_torch` has returned true.

    Return the arguments of `Archive.write_record` for each record, and ``alignment`` and ``has_crc32`` of `Archive`.
    """
    import torch.serialization as its

    records = _Records()
    its._save(state, records, pickle_module, its.DEFAULT_PROTOCOL, False)  # type: ignore[no-untyped-call]
    return records, its._get_storage_alignment(), its.get_crc32_options()


def save(state: Any, stream: Writable, pickle_module: Any, *, identity: str = "") -> None:
    """Write a torch file with `Archive`; only after `is_like_torch` has returned true. See `Archive.close`."""
    import torch.serialization as its

    archive = Archive(stream, alignment=its._get_storage_alignment(), has_crc32=its.get_crc32_options())
    its._save(state, archive, pickle_module, its.DEFAULT_PROTOCOL, False)  # type: ignore[no-untyped-call]
    archive.close(identity)


@functools.cache
def is_like_torch() -> bool:
    """Return whether `save` writes the same bytes as the installed torch: a small state is written with both, once."""
    import torch

    sample = {"of bytes": torch.ones(3), "empty": torch.empty(0)}
    theirs, ours = io.BytesIO(), io.BytesIO()
    torch.save(sample, theirs)
    identity = re.search(rb"\d{40}", theirs.getvalue())
    try:
        save(sample, ours, pickle, identity=identity[0].decode() if identity else "")
    except SaveError:  # Within skip_data: that says nothing about torch.
        raise
    except Exception:  # `_save` is a private function: its name, its parameters and what it calls may change.
        return False
    return theirs.getvalue() == ours.getvalue()


def memory(data: Any, size: int) -> memoryview:
    """Return the bytes of a record."""
    if isinstance(data, str):
        return memoryview(data.encode())
    if isinstance(data, (bytes, memoryview)):
        return memoryview(data)
    return memory_at(data.data_ptr(), size)  # `data` outlives the view.


def _padding(start: int, alignment: int) -> bytes:
    """Return an extra field after which a record's bytes are aligned."""
    count = -(start + 4) % alignment
    return b"FB" + struct.pack("<H", count & 0xFFFF) + b"Z" * count


def _wide(start: int, size: int, stored: int) -> bytes:
    """Return the extra field that holds what does not fit 32 bits."""
    values = [size, stored] * (size >= _LIMIT) + [start] * (start >= _LIMIT)
    return struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values)
