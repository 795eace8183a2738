"""Processes that may run longer than the test process that started them, and their ports."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def free_ports(count: int) -> list[int]:
    """Return free ports of 127.0.0.1."""
    with contextlib.ExitStack() as stack:
        # All are bound at once, so that they differ.
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def find_program(name: str) -> str | None:
    """Return the path of a program of this environment or of the system, sbin included."""
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin"]
    return shutil.which(name, path=os.pathsep.join(folders))


def missing(programs: Sequence[str] = (), modules: Sequence[str] = ()) -> str | None:
    """Return which of them are not installed and how to install them, or None."""
    absent = [name for name in programs if find_program(name) is None]
    absent += [f"Python module {name}" for name in modules if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}; run: make servers" if absent else None


def spawn(command: Sequence[str | os.PathLike[str]], log: Path, env: Mapping[str, str] | None = None) -> int:
    """Start a program in a process group of its own and return its pid, which is the group's too."""
    program = find_program(os.fspath(command[0]))
    assert program is not None, command[0]
    # Not by Popen, because it warns of running children: one process starts a shared server, and another stops it.
    return os.posix_spawn(
        program,
        [program, *(os.fspath(part) for part in command[1:])],
        {**os.environ, **(env or {})},
        setsid=True,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, os.fspath(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
    )


def has_ended(pid: int) -> bool:
    """Return whether a process has ended; a child is reaped."""
    try:
        return os.waitpid(pid, os.WNOHANG) != (0, 0)
    except ChildProcessError:
        pass
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def kill(pids: Sequence[int]) -> None:
    """Kill process groups by the pid of their first process, and wait for those that this process started."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
