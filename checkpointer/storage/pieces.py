"""Fills the buffers of a payload in the order of the file, with several threads that are ahead of the caller."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator, Sequence
from typing import BinaryIO, Final

from checkpointer._parallel import ahead
from checkpointer.ports import Storage, SupportsPieces

_CHUNK: Final = 1 << 20

Pieces = Sequence[tuple[int, memoryview]]


def filled(storage: Storage, path: str, stream: BinaryIO, pieces: Pieces) -> Iterator[int]:
    """Fill the pieces as the storage does it, or from the opened file. See `SupportsPieces.read_pieces`."""
    return storage.read_pieces(path, pieces) if isinstance(storage, SupportsPieces) else fill(stream, pieces)


def fill(stream: BinaryIO, pieces: Pieces) -> Iterator[int]:
    """Fill the pieces from a stream; a file of this machine is read by several threads. Raises as `filled` does."""
    # Another stream's fileno() may be that of a compressed file.
    is_file = isinstance(stream, io.BufferedReader) and isinstance(stream.raw, io.FileIO) and hasattr(os, "preadv")
    if is_file:
        descriptor = stream.fileno()
        yield from ahead(lambda number: _read_at(descriptor, *pieces[number]), len(pieces))
        return
    for number, (offset, view) in enumerate(pieces):
        if not number or stream.tell() != offset:
            stream.seek(offset)
        _read_next(stream, view)
        yield number + 1


def _read_at(descriptor: int, offset: int, view: memoryview) -> None:
    while view:
        count = os.preadv(descriptor, [view], offset)
        if not count:
            raise _cut(offset)
        offset, view = offset + count, view[count:]


def _read_next(stream: BinaryIO, view: memoryview) -> None:
    while view:
        chunk = stream.read(min(len(view), _CHUNK))
        if not chunk:
            raise _cut(stream.tell())
        view[: len(chunk)] = chunk
        view = view[len(chunk) :]


def _cut(at: int) -> OSError:
    return OSError(errno.EIO, f"the file ends at byte {at}, within what was expected of it")
