"""Hosts on one machine: each has its own process ids, host name and network, and all share the filesystem.

A server of the tests listens on 127.0.0.1 of this machine. Each host reaches it through a proxy of its own, which
listens on the same port of the host's 127.0.0.1. So a URL is the same on every host, and a test can cut one host off.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

from support.mounts import give_up, need, sh
from support.servers.chaosproxy import ChaosProxy, bound

T = TypeVar("T")

PATIENCE_S: Final = 60.0
"""Only a failing test waits so long, in seconds."""
_BOOT: Final = (
    "grep ' {temp}/' /proc/mounts | cut -d' ' -f2 | sort -r | while read mount; do umount -l $mount; done; "
    "hostname {name} && ip link set lo up && echo ready && while read line; do :; done"
)
"""What the first process of a host does. When its stdin is closed it ends, and the kernel kills the others.

First it drops its copies of what other tests have mounted, because these could not be unmounted for good otherwise.
"""
_CLONE_NEWNET: Final = 0x40000000


class Host:
    """A host named ``name``, while the context is open."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> Host:
        need("unshare", "nsenter", "ip", "hostname", part="namespaces")
        kinds = ["--pid", "--uts", "--net", "--mount", "--mount-proc", "--fork", "--kill-child"]
        boot = ["sh", "-c", _BOOT.format(name=self.name, temp=tempfile.gettempdir())]
        self._unshare = subprocess.Popen(
            ["unshare", *kinds, *boot], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._unshare.stdout is not None
        if "ready\n" != self._unshare.stdout.readline():
            self.__exit__()
            give_up(["the right to make namespaces"], "namespaces")
        [self.first] = _children(self._unshare.pid)
        return self

    def __exit__(self, *error: object) -> None:
        assert self._unshare.stdin is not None
        assert self._unshare.stdout is not None
        self._unshare.stdin.close()
        self._unshare.stdout.close()
        self._unshare.wait()

    def kill(self) -> None:
        """End it as a loss of power does: the kernel kills all its processes at once."""
        os.kill(self.first, signal.SIGKILL)
        self.__exit__()

    def network(self, *command: str) -> None:
        """Run ``ip`` in the host's network."""
        sh("nsenter", "--target", self.first, "--net", "ip", *command)

    def start(self, *command: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start a program on the host. The process that is returned has its exit code, and its child is the program."""
        enter = ["nsenter", "--target", str(self.first), "--pid", "--uts", "--net", "--mount", f"--wd={os.getcwd()}"]
        return subprocess.Popen([*enter, *command], **options)

    def proxy(self, port: int) -> ChaosProxy:
        """Return a proxy to ``port`` of this machine, which listens on the same port of the host."""
        return ChaosProxy(port, lambda wanted: self._inside(lambda: bound(wanted or port)))

    def _inside(self, make: Callable[[], T]) -> T:
        """Call ``make`` in the host's network. A socket belongs to the network in which it was made."""
        made: list[T] = []

        def work() -> None:
            with open(f"/proc/{self.first}/ns/net") as network:
                libc = ctypes.CDLL(None, use_errno=True)
                # It moves only this thread, which ends here.
                if libc.setns(network.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            made.append(make())

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return made[0]


class Trainings:
    """Runs trainings of a module on a host, one after the other, while the context is open."""

    def __init__(self, host: Host, module: str = "support.host_me") -> None:
        self.host = host
        self._module = module

    def __enter__(self) -> Trainings:
        self._agent = self.host.start(sys.executable, "-m", self._module, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._unread = b""
        self._training: Training | None = None
        return self

    def __exit__(self, *error: object) -> None:
        for pid in _descendants(self._agent.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert self._agent.stdin is not None
        assert self._agent.stdout is not None
        self._agent.stdin.close()
        self._agent.stdout.close()
        self._agent.wait()

    def start(self, log: Path, **arguments: Any) -> Training:
        """Start a training, whose stderr goes to ``log``; see `support.host_me.train`."""
        self.send(json.dumps({"log": str(log), **arguments}))
        self._training = Training(self, log)
        return self._training

    def clear(self) -> None:
        """Kill the training that runs, if there is one."""
        if self._training is not None:
            self._training.kill()

    def send(self, line: str) -> None:
        """Write a line to the agent, or to the training that it waits for."""
        assert self._agent.stdin is not None
        self._agent.stdin.write(line.encode() + b"\n")
        self._agent.stdin.flush()

    def read(self) -> list[str]:
        """Return the parts of the next line."""
        assert self._agent.stdout is not None
        deadline = time.monotonic() + PATIENCE_S
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            assert select.select([self._agent.stdout], [], [], max(0.0, left))[0], f"{self.host.name} says nothing"
            data = os.read(self._agent.stdout.fileno(), 1 << 16)
            assert data, f"{self.host.name}: the agent ended; its error is above"
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode().split(" ")

    @property
    def has_line(self) -> bool:
        """Whether a line can be read without waiting."""
        assert self._agent.stdout is not None
        return b"\n" in self._unread or bool(select.select([self._agent.stdout], [], [], 0)[0])

    @property
    def pids(self) -> list[int]:
        """The pids, on this machine, of the processes of the training; empty if none runs."""
        return _descendants(self._agent.pid)[1:]


class Training:
    """A training on a host.

    Attributes:
        host: The host's name.
        said: The lines that it wrote, each as a list of parts.
        said_before: How many of them it wrote before it was stopped.
        code: Its exit code, after `wait`.
        thaws: Are called before it goes on.
    """

    def __init__(self, trainings: Trainings, log: Path) -> None:
        self.host = trainings.host.name
        self._trainings = trainings
        self._log = log
        self.said: list[list[str]] = []
        self.said_before = 0
        self.code: int | None = None
        self.thaws: list[Callable[[], None]] = []
        self.pid = int(self.read_until("pid")[1])
        """On its host."""

    def read_until(self, what: str) -> list[str]:
        """Return the next line that begins with ``what``, or the line about its end."""
        while True:
            line = self._take()
            if line[0] in (what, "ended"):
                return line

    def _take(self) -> list[str]:
        line = self._trainings.read()
        self.said.append(line)
        if line[0] == "ended":
            self.code = int(line[1])
        return line

    def wait(self) -> int:
        """Wait for its end and return its exit code."""
        if self.code is None:
            self.read_until("ended")
        assert self.code is not None
        return self.code

    def stop(self) -> None:
        """Stop all its threads, as a machine that is suspended does."""
        self._send(signal.SIGSTOP)
        self.await_stop()

    def await_stop(self) -> bool:
        """Wait until it is stopped, and return whether it is; it may have ended before."""
        deadline = time.monotonic() + PATIENCE_S
        while not (pids := self._trainings.pids) or any(_state(pid) != "T" for pid in pids):
            assert time.monotonic() < deadline, f"not stopped: {self.said}"
            if self.code is not None:
                return False
            self._read_what_is_there()
            time.sleep(0.002)
        self._read_what_is_there()
        self.said_before = len(self.said)
        return True

    def await_request(self, arrived: threading.Event) -> bool:
        """Wait until the proxy holds its request, and return whether it does; it may have ended before."""
        deadline = time.monotonic() + PATIENCE_S
        while not arrived.wait(0.002):
            assert time.monotonic() < deadline, f"no request arrived: {self.said}"
            if self.code is not None:
                return False
            self._read_what_is_there()
        return True

    def go_on(self) -> None:
        """Let it go on, if it was stopped."""
        for thaw in self.thaws:
            thaw()
        self._send(signal.SIGCONT)

    def kill(self) -> None:
        """Kill it, if it runs, and wait for its end."""
        if self.code is None:
            self._send(signal.SIGKILL)
        self.wait()

    def open_gate(self) -> None:
        """Let it go on, if it waits at its gate."""
        if self.code is None:
            self._trainings.send("go")

    def _send(self, number: signal.Signals) -> None:
        for pid in self._trainings.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _read_what_is_there(self) -> None:
        while self.code is None and self._trainings.has_line:
            self._take()

    @property
    def errors(self) -> str:
        """What it has written to stderr."""
        return self._log.read_text()

    def steps(self, what: str, *, since: int = 0, until: int | None = None) -> list[int]:
        """Return the step of each line that begins with ``what``, of the lines ``since`` to ``until``."""
        return [int(line[1]) for line in self.said[since:until] if line[0] == what]

    def count(self) -> int:
        """Return how many operations in the folder it did, after its end."""
        [line] = [line for line in self.said if line[0] == "done"]
        return int(line[2])


@contextlib.contextmanager
def two_hosts(module: str = "support.host_me") -> Iterator[tuple[Trainings, Trainings]]:
    """Boot two hosts, ``alpha`` and ``beta``, which run trainings of a module."""
    with contextlib.ExitStack() as stack:
        alpha, beta = (stack.enter_context(Host(name)) for name in ("alpha", "beta"))
        yield stack.enter_context(Trainings(alpha, module)), stack.enter_context(Trainings(beta, module))


def _children(pid: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _descendants(pid: int) -> list[int]:
    children = _children(pid)
    return [one for child in children for one in (child, *_descendants(child))]


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""
