"""Starts a server and waits until it is ready: one for all workers of a test run, or one for a single test."""

from __future__ import annotations

import contextlib
import fcntl
import json
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import attrs

from support.servers.processes import has_ended, kill, spawn
from support.servers.server import Server

S = TypeVar("S", bound=Server)

DEADLINE_S = 60.0
ATTEMPTS = 3
"""Another program may take a free port before the server binds it."""


@contextlib.contextmanager
def running(kind: type[S], folder: Path) -> Iterator[S]:
    """Run a server for one test, which may kill it."""
    with shared(kind, folder / kind.name) as server:
        try:
            yield server
        finally:
            kill(server.pids)


@contextlib.contextmanager
def shared(kind: type[S], folder: Path) -> Iterator[S]:
    """Run one server for all processes with the same folder. The first starts it, and it ends after the last."""
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "state.json"
    # Users are counted by shared locks, because the kernel releases the lock of a killed worker.
    with open(folder / "users", "a") as users, open(folder / "lock", "a") as starting:
        fcntl.flock(starting, fcntl.LOCK_EX)
        fcntl.flock(users, fcntl.LOCK_SH)
        server = _known(kind, state)
        if server is None:
            server = launch(kind, folder)
            _stop_without(folder / "users", server.pids)
            known = {"folder": str(server.folder), "port": server.port, "pids": server.pids}
            state.write_text(json.dumps(known))
        fcntl.flock(starting, fcntl.LOCK_UN)
        yield server


def _known(kind: type[S], state: Path) -> S | None:
    """Return the server that another process has started; None if it has ended."""
    if not state.exists():
        return None
    known = json.loads(state.read_text())
    server = kind(Path(known["folder"]), known["port"], tuple(known["pids"]))
    return None if any(has_ended(pid) for pid in server.pids) else server


def _stop_without(users: Path, pids: Sequence[int]) -> None:
    """Start a process that kills the server as soon as its users hold no lock, even if they were killed."""
    groups = " ".join(f"-{pid}" for pid in pids)
    spawn(["flock", "--exclusive", users, "sh", "-c", f"kill -9 {groups}"], users.with_name("stop.log"))


def launch(kind: type[S], folder: Path) -> S:
    """Start a server and wait until it is ready.

    Raises:
        RuntimeError: If it ends or is not ready in time; with the end of its log.
    """
    for attempt in range(ATTEMPTS):
        place = folder / f"{kind.name}-{time.time_ns()}"
        place.mkdir(parents=True)
        server = kind.start(place)
        assert isinstance(server, kind)
        try:
            error = _wait_until_ready(server)
        except BaseException:
            kill(server.pids)
            raise
        if error is None:
            return server
        ended = any(has_ended(pid) for pid in server.pids)
        kill(server.pids)
        if not ended or attempt == ATTEMPTS - 1:
            break
    log = "\n".join(path.read_text(errors="replace")[-2000:] for path in sorted(place.glob("*.log")))
    msg = (
        f"the {kind.name} server {'ended' if ended else f'is not ready after {DEADLINE_S:g} s'} ({error}); log:\n{log}"
    )
    raise RuntimeError(msg)


def restart(server: S) -> S:
    """Kill a server and start it again on its ports and its folder. The caller has to kill the new one."""
    [pid] = server.pids
    process = Path(f"/proc/{pid}")
    command = process.joinpath("cmdline").read_text().split("\0")[:-1]
    variables = dict(each.split("=", 1) for each in process.joinpath("environ").read_text().split("\0")[:-1])
    kill(server.pids)
    again = attrs.evolve(server, pids=(spawn(command, server.folder / "again.log", variables),))
    error = _wait_until_ready(again)
    if error is not None:
        kill(again.pids)
        raise error
    return again


def _wait_until_ready(server: Server) -> Exception | None:
    """Return None, or the last error if the server has ended or time is up."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", server.port), timeout=1).close()
            server.prepare()
            return None
        except Exception as error:
            if time.monotonic() > deadline or any(has_ended(pid) for pid in server.pids):
                return error
        time.sleep(0.02)
