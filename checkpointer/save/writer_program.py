"""The program of the writer process: it writes torch files whose tensors lie in memory that it shares with the trainer.

The trainer sends each job as one message, with the descriptors of the file and of the shared memory. This process
computes checksums and digest, writes the file, and answers. It does not sync or publish it: the trainer does that, as
for a file that it has written itself. The program ends when the trainer does. It imports neither torch nor the manager.
"""

from __future__ import annotations

import contextlib
import errno
import marshal
import mmap
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Any, Final

from checkpointer._write_back import WRITE_BACK, begin_write_back
from checkpointer.formats.archive import CHUNK, Archive
from checkpointer.formats.shared_memory import BLOCK
from checkpointer.records.digest_algorithms import DIGESTS

REPORT_S: Final = 1.0
"""Seconds between two reports of how much is written."""
_IDLE_S: Final = 10.0
"""Seconds between two looks whether the trainer is alive: a process that it has forked may keep the socket open."""
_DIRECT: Final = getattr(os, "O_DIRECT", 0)
_MAX_DESCRIPTORS: Final = 8
_LENGTH: Final = struct.Struct("<Q")
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors that the thread would get too."""
_ENDING: Final = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM")
"""Signals that a terminal or a scheduler sends to all processes of a job. The trainer decides what they mean."""


def version() -> str:
    """Return the version of this code. The trainer's may be older, if the package was upgraded meanwhile."""
    return str(sys.modules["checkpointer"].__version__)


def send(connection: socket.socket, message: Any, descriptors: list[int] | None = None) -> None:
    """Send a message: a tuple of plain values, and descriptors."""
    data = marshal.dumps(message)
    socket.send_fds(connection, [_LENGTH.pack(len(data))], descriptors or [])
    connection.sendall(data)


def receive(connection: socket.socket) -> tuple[Any, list[int]]:
    """Return the next message and its descriptors; raise `EOFError` if the other process has ended."""
    head, descriptors, _, _ = socket.recv_fds(connection, _LENGTH.size, _MAX_DESCRIPTORS)
    try:
        head += _exactly(connection, _LENGTH.size - len(head))
        return marshal.loads(_exactly(connection, _LENGTH.unpack(head)[0])), descriptors
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]
    return bytes(data)


def set_direct(descriptor: int, *, is_direct: bool) -> bool:
    """Let writes go to the disk without the page cache, or no longer; return whether they do."""
    import fcntl  # Not on Windows.

    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    flags = flags | _DIRECT if is_direct else flags & ~_DIRECT
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
    except OSError:  # The filesystem cannot.
        return False
    return is_direct and bool(_DIRECT)


class DirectFile:
    """Writes a file from its beginning, and digests it. Whole blocks go from the caller's memory to the disk.

    What does not begin at a block, in memory or in the file, is collected in a buffer of whole blocks. If the
    filesystem refuses that, with whichever error, the writes go through the page cache. ``on_write`` is called after
    each write.
    """

    def __init__(self, descriptor: int, algorithm: str, on_write: Callable[[int], object]) -> None:
        self._descriptor = descriptor
        self._hash = DIGESTS[algorithm]()
        self._on_write = on_write
        self._is_direct = set_direct(descriptor, is_direct=True)
        self._buffer = mmap.mmap(-1, CHUNK)
        self._held = 0
        self._written = 0
        self._begun = 0
        """Bytes that the kernel was asked to write to the disk."""

    @property
    def hexdigest(self) -> str:
        """The digest so far."""
        return self._hash.hexdigest()  # type: ignore[no-any-return]

    def write(self, data: Any) -> int:
        """See `Writable.write`."""
        view = memoryview(data)
        self._hash.update(view)
        while view:
            if self._held and not self._held % BLOCK and len(view) >= BLOCK:
                self._put_held(self._held)
            count = len(view) - (len(view) % BLOCK if self._is_direct else 0)
            if not self._held and count and self._put(view[:count]):
                view = view[count:]
                continue
            part = view[: CHUNK - self._held]
            self._buffer[self._held : self._held + len(part)] = part
            self._held += len(part)
            view = view[len(part) :]
            if self._held == CHUNK:
                self._put_held(CHUNK)
        return len(data)

    def finish(self) -> int:
        """Write what is left, and return the file's size in bytes."""
        whole = self._held - self._held % BLOCK
        if whole:
            self._put_held(whole)
        self._is_direct = set_direct(self._descriptor, is_direct=False)
        self._put_held(self._held)
        return self._written

    def _put_held(self, count: int) -> None:
        with memoryview(self._buffer) as view:
            self._put(view[:count], is_aligned=True)
        self._buffer.move(0, count, self._held - count)
        self._held -= count

    def _put(self, view: memoryview, *, is_aligned: bool = False) -> bool:
        """Write at the end of the file; return False if the memory has to be copied to another place first."""
        is_begun = False
        while view:
            try:
                count = os.pwrite(self._descriptor, view, self._written)
            except OSError:
                if not self._is_direct:
                    raise
                if not (is_aligned or is_begun):
                    return False
                self._is_direct = set_direct(self._descriptor, is_direct=False)
                continue
            is_begun = True
            self._written += count
            view = view[count:]
        if not self._is_direct and self._written - self._begun >= WRITE_BACK:
            begin_write_back(self._descriptor, self._begun, self._written - self._begun)
            self._begun = self._written
        self._on_write(self._written)
        return True


_Views = dict[tuple[int, int], memoryview]
"""Shared memory, by what identifies it."""


def _mapped(descriptors: list[int], before: _Views) -> _Views:
    """Return the memory behind each descriptor, which all differ; take what was mapped ``before`` from there."""
    views: _Views = {}
    for descriptor in descriptors:
        info = os.fstat(descriptor)
        key = info.st_dev, info.st_ino
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        views[key] = before.get(key) or memoryview(mmap.mmap(descriptor, 0, flags=flags, prot=mmap.PROT_READ))
    return views


def _execute(job: Any, file: int, views: list[memoryview], on_write: Callable[[int], object]) -> tuple[str, int, str]:
    """Write one file, and return the answer."""
    records, alignment, has_crc32, algorithm = job
    stream = DirectFile(file, algorithm, on_write)
    archive = Archive(stream, alignment=alignment, has_crc32=has_crc32, large_alignment=BLOCK)
    for name, data, size in records:
        if isinstance(data, tuple):  # In shared memory: of which, and where.
            data = views[data[0]][data[1] : data[1] + size]
        archive.write_record(name, data, size)
    archive.close()
    return "done", stream.finish(), stream.hexdigest


def _reporter(connection: socket.socket, check: Callable[[], object]) -> Callable[[int], None]:
    """Return a function that checks that the trainer is alive, and reports now and then how much is written."""
    last = time.monotonic()

    def report(written: int) -> None:
        nonlocal last
        check()
        if time.monotonic() - last >= REPORT_S:
            last = time.monotonic()
            send(connection, ("at", written))

    return report


def main(connection: socket.socket, trainer: int) -> None:
    """Execute jobs until the trainer ends."""
    for name in _ENDING:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    send(connection, version())

    def check() -> None:
        if os.getppid() != trainer:
            os._exit(0)

    views: _Views = {}
    while True:
        while not select.select([connection], [], [], _IDLE_S)[0]:
            check()
        job, descriptors = receive(connection)
        answer: tuple[Any, ...]
        try:
            file, views = descriptors[0], _mapped(descriptors[1:], views)
            answer = _execute(job, file, [*views.values()], _reporter(connection, check))
        except Exception as error:  # An error of this process must not fail the save, so the thread tries it too.
            is_full = isinstance(error, OSError) and error.errno in _FULL
            answer = ("failed", *error.args[:2]) if is_full else ("cannot", f"{type(error).__name__}: {error}")
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        send(connection, answer)


def run(trainer: str) -> None:
    """Run the program for the process with the id ``trainer``. Its socket is the standard input."""
    with contextlib.suppress(EOFError, ConnectionError):
        main(socket.socket(fileno=0), int(trainer))
