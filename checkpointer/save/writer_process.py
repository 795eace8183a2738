"""Writes a snapshot in shared memory by another process, so that the training keeps the GIL.

The other process runs `checkpointer.save.writer_program`. The writer thread waits for it, then syncs and publishes the
file as if it had written it itself. If the process ends or makes no progress, the thread writes the same checkpoint
into a new file.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Sequence
from typing import Any, Final

import attrs

from checkpointer.formats import archive, shared_memory
from checkpointer.formats.pickler import ByValue
from checkpointer.formats.shared_memory import Arena
from checkpointer.formats.torch_file import TorchFormat
from checkpointer.ports import SupportsDescriptor, Writable
from checkpointer.save import writer_program
from checkpointer.save.writer_program import REPORT_S

_MAX_SENT: Final = 32 << 20
"""Bytes outside of the shared memory that are sent, because the process holds them a second time."""
_SMALL: Final = 1 << 16
START_S: Final = 60.0
"""Seconds that the process gets to start. An interpreter in a folder on a network may take long."""
STALLED_S: Final = 30
"""Seconds without progress after which the process is ended. It may be stopped, or frozen by a container."""
_END_S: Final = 10.0
"""Seconds that the process gets to end by itself, and then to be ended."""
_PROGRAM: Final = (
    "import sys; sys.path += sys.argv[2:]; from checkpointer.save.writer_program import run; run(sys.argv[1])"
)

_log = logging.getLogger("checkpointer")


@attrs.frozen
class _Process:
    """The process, and the connection to it."""

    child: subprocess.Popen[bytes]
    connection: socket.socket
    trainer: int
    """Id of the process that has started it. Forked children of the trainer must leave it alone."""

    def end(self, *, at_once: bool = False) -> int | None:
        """End it, if it has not ended yet; return its exit code, or minus the number of the signal that ended it.

        Return None if it cannot be ended, for example while a disk does not answer it.
        """
        if os.getpid() != self.trainer:
            return None
        if at_once:
            self.child.kill()
        # Not only closed, because forked children of the trainer may have the socket open.
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()
        for _ in range(2):
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.child.wait(_END_S)
            self.child.kill()
        return None


class WriterProcess:
    """Writes torch files by a process that is started when it is first needed.

    Without shared memory, and for files of a remote storage, the calling thread writes, as `TorchFormat.write` does.
    """

    def __init__(self, payload: TorchFormat) -> None:
        self._payload = payload
        self._process: _Process | None = None
        # A program that embeds Python would be started a second time.
        self._is_usable = "python" in os.path.basename(sys.executable or "") and not getattr(sys, "frozen", False)

    @property
    def pid(self) -> int | None:
        """Id of the process, if it runs."""
        return self._process.child.pid if self._process is not None else None

    def write(self, state: Any, stream: Writable) -> None:
        """See `Format.write`."""
        if not (
            self._is_usable
            and isinstance(stream, SupportsDescriptor)
            and stream.descriptor is not None
            and self._write_there(state, stream, stream.descriptor)
        ):
            self._payload.write(state, stream)

    def _write_there(self, state: Any, stream: SupportsDescriptor, descriptor: int) -> bool:
        """Let the process write; return False if the calling thread has to do it."""
        job = _job_of(state, stream.algorithm)
        if job is None:
            return False
        message, arenas = job
        process: _Process | None = None
        try:
            process = self._running()
            descriptors = [descriptor, *(arena.descriptor for arena in arenas)]
            writer_program.send(process.connection, message, descriptors)
            answer = _answer(process.connection, stream)
        except (EOFError, OSError) as error:
            self._give_up(process, error)
            answer = ()
        except BaseException:  # The next answer would be that of this job.
            self.close()
            raise
        if answer[:1] == ("done",):
            stream.take_over(answer[1], answer[2])
            return True
        if answer[:1] == ("failed",):
            raise OSError(*answer[1:])
        stream.start_over()
        if answer:  # What it lacks now, such as memory, it may lack each time.
            self._is_usable = False
            self.close()
            msg = "the writer process cannot write (%s). The writer thread writes this checkpoint, and all later ones"
            _log.warning(msg, answer[1])
        return False

    def _running(self) -> _Process:
        if self._process is not None and self._process.trainer != os.getpid():
            self._process = None
        if self._process is None:
            self._process = _start()
            weakref.finalize(self, self._process.end)
        return self._process

    def _give_up(self, process: _Process | None, error: BaseException) -> None:
        """End the process and log why. All later saves are written by the thread, because it could happen again."""
        self._is_usable, self._process = False, None
        if process is None:
            why = str(error) or "it has ended at once"
            _log.warning("no writer process can be started (%s); the writer thread writes", why)
            return
        code = process.end(at_once=isinstance(error, TimeoutError)) or 0
        how = f"has ended ({signal.strsignal(-code) if code < 0 else f'exit code {code}'})"
        how = f"was ended, because it {error}" if isinstance(error, TimeoutError) else how
        msg = "the writer process %d %s. The writer thread writes this checkpoint again, and all later ones"
        _log.warning(msg, process.child.pid, how)

    def close(self) -> None:
        """End the process. A later write would start another one."""
        process, self._process = self._process, None
        if process is not None:
            process.end()


def _answer(connection: socket.socket, stream: SupportsDescriptor) -> tuple[Any, ...]:
    """Wait until the process has written or failed; until then count what is written.

    Raises:
        TimeoutError: If the process has reported no progress for `STALLED_S`.
    """
    waiting, silent = select.poll(), 0
    waiting.register(connection, select.POLLIN)
    # In steps of one report, because a trainer that was stopped itself must not count the time of its stop.
    while silent < STALLED_S / REPORT_S:
        if not waiting.poll(REPORT_S * 1000):
            silent += 1
            continue
        silent = 0
        answer: tuple[Any, ...] = writer_program.receive(connection)[0]
        if answer[0] != "at":
            return answer
        stream.count_to(answer[1])
    msg = f"has made no progress for {STALLED_S} s"
    raise TimeoutError(msg)


def _job_of(state: Any, algorithm: str) -> tuple[tuple[Any, ...], list[Arena]] | None:
    """Return what the process is to write, and the shared memory that has the tensors.

    Return None if the process cannot do it, or if too much of it is outside of the shared memory.
    """
    known = shared_memory.arenas()
    if not known or not archive.is_like_torch():
        return None
    try:
        records, alignment, has_crc32 = archive.plan(state, ByValue)
    except Exception:  # `TorchFormat.write` raises an error that says which part of the state it is.
        return None
    sent, used = 0, dict[Arena, int]()
    pieces: list[tuple[str, Any, int]] = []
    for name, data, size in records:
        is_text = isinstance(data, (str, bytes))
        place = None if is_text else _place_of(data, size, known)
        if place is not None:
            pieces.append((name, (used.setdefault(place[0], len(used)), place[1]), size))
            continue
        sent += size
        if sent > _MAX_SENT or not (is_text or size < _SMALL):
            return None
        pieces.append((name, data if is_text else bytes(archive.memory(data, size)), size))
    return ((pieces, alignment, has_crc32, algorithm), [*used]) if used else None


def _place_of(storage: Any, size: int, arenas: Sequence[Arena]) -> tuple[Arena, int] | None:
    """Return in which shared memory a storage lies, and where."""
    address = storage.data_ptr()
    for arena in arenas:
        offset = arena.offset_of(address, size)
        if offset is not None:
            return arena, offset
    return None


def _start() -> _Process:
    """Start the program in an interpreter that imports nothing else. Not in our process group, because of Ctrl-C."""
    modules = [sys.modules.get(name) for name in ("checkpointer", "xxhash", "zlib_ng")]
    paths = {os.path.dirname(os.path.dirname(os.path.abspath(m.__file__))): None for m in modules if m and m.__file__}
    command = [sys.executable, "-I", "-S", "-B", "-c", _PROGRAM, str(os.getpid()), *paths]
    # The first three descriptors are taken. If one were free, a message could be written into a checkpoint.
    stderr = None if _has_stderr() else subprocess.DEVNULL
    ours, theirs = socket.socketpair()
    process: _Process | None = None
    try:
        with theirs:
            theirs.setblocking(True)  # Also after `socket.setdefaulttimeout`.
            child = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
                cwd="/",
            )
        process = _Process(child, ours, os.getpid())
        _check_version(ours)
    except BaseException:
        ours.close()
        if process is not None:
            process.child.kill()
            process.end()
        raise
    return process


def _check_version(connection: socket.socket) -> None:
    """Wait until the program runs. Raise `OSError` if it does not, or if it is that of another version."""
    connection.settimeout(START_S)
    its, ours = writer_program.receive(connection)[0], writer_program.version()
    if its != ours:
        msg = f"its version is {its}, and that of the trainer is {ours}"
        raise OSError(msg)
    connection.settimeout(STALLED_S)


def _has_stderr() -> bool:
    """Return whether a new process gets a descriptor 2 from this one; a daemon has closed it, or it is another file."""
    try:
        return os.get_inheritable(2)
    except OSError:
        return False
