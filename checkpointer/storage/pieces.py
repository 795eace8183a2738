"""Fills the buffers of a payload in the order of the file, with several threads that are ahead of the caller."""

from __future__ import annotations

import errno
import io
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, Final

from checkpointer.ports import Storage, SupportsPieces

_CHUNK: Final = 1 << 20
_MAX_THREADS: Final = 8
_PIECES_PER_THREAD: Final = 4
"""A thread for fewer pieces than this costs more than it gains."""

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


def ahead(act: Callable[[int], object], count: int) -> Iterator[int]:
    """Call ``act`` with each number below ``count``, on as many threads as there are cores.

    Yield how many of the first numbers are done. While the next one is not, the caller's thread works too. All threads
    have ended when the iterator is exhausted, is closed, or raises what ``act`` has raised.
    """
    done = bytearray(count)
    todo = iter(range(count))
    lock = threading.Lock()
    errors: list[BaseException] = []

    def work_once() -> bool:
        with lock:
            number = None if errors else next(todo, None)
        if number is None:
            return False
        try:
            act(number)
        except BaseException as error:
            errors.append(error)
            return False
        done[number] = True
        return True

    def work() -> None:
        while work_once():
            pass

    helpers = [threading.Thread(target=work, daemon=True) for _ in range(_num_threads(count) - 1)]
    try:
        for helper in helpers:
            helper.start()
        for number in range(count):
            while not done[number]:
                if not work_once():
                    _join(helpers)
                    if errors:
                        raise errors[0]
            yield number + 1
    finally:
        with lock:
            todo = iter(())
        _join(helpers)


def _num_threads(count: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _MAX_THREADS, count // _PIECES_PER_THREAD))


def _join(helpers: list[threading.Thread]) -> None:
    for helper in helpers:
        if helper.ident is not None:
            helper.join()


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
