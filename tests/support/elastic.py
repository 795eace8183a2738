"""Hosts in one network, each with an agent of torchrun, which a test kills and boots again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import attrs

from support.elastic_me import AGAIN, END, ON, ROAM
from support.hosts import Host
from support.mounts import give_up
from support.servers.chaosproxy import ChaosProxy, Halt, Pass, Refuse

Name = Literal["alpha", "beta"]
BOTH: Final[tuple[Name, Name]] = ("alpha", "beta")
_ADDRESSES: Final = {"alpha": "10.77.0.1", "beta": "10.77.0.2"}
"""Torchrun sorts hosts by their address, so rank 0 is on the first one, if it is there."""
_HARDWARE: Final = {"alpha": "02:00:00:00:00:01", "beta": "02:00:00:00:00:02"}
"""The addresses stay those that the other host has cached."""
_SCRIPT: Final = Path(__file__).with_name("elastic_me.py")
PATIENCE_S: Final = 120.0
"""Only a failing test waits so long, in seconds."""
_RDZV: Final = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=8,join_timeout=60"
"""If a live agent is taken for a lost one, because the machine is busy, torchrun starts a second group."""


T = TypeVar("T")
Line = dict[str, Any]
"""What a process says: see `support.elastic_me.Notes`."""


def other(host: Name) -> Name:
    """Return the other host."""
    return "beta" if host == "alpha" else "alpha"


@attrs.define
class Booted:
    """A host that runs, and what it runs."""

    host: Host
    agent: subprocess.Popen[bytes] | None = None
    proxy: ChaosProxy | None = None


class Cluster:
    """Two hosts and a switch between them, while the context is open.

    Args:
        folder: For the lines of the training, and the logs.
        way: See `support.elastic_me.train`.
        directory: The directory of the training.
        options: Its storage options, if it is a URL.
        port: Port of the server on 127.0.0.1, if the directory is a URL.
        ranks: How many on each host.
        lease_s: The lease, in seconds.
    """

    def __init__(
        self,
        folder: Path,
        way: str,
        directory: str,
        *,
        options: dict[str, Any] | None = None,
        port: int = 0,
        ranks: int = 1,
        lease_s: float = 1.5,
    ) -> None:
        self._folder, self._way, self._directory = folder, way, directory
        self._port, self._ranks = port, ranks
        self._options = {"lease_s": lease_s, **({"storage_options": options} if options else {})}
        self._booted: dict[Name, Booted] = {}
        self._stack = contextlib.ExitStack()
        self._place: Name = "alpha"
        """The host of the rendezvous."""
        self._thawed = threading.Event()
        self._read_to = 0
        self._boots = 0
        self.lines: list[Line] = []
        """What all processes have said."""
        (folder / "log").touch()

    def __enter__(self) -> Cluster:
        self._switch = self._stack.enter_context(Host("switch"))
        try:
            self._switch.network("link", "add", "cable", "type", "veth", "peer", "name", "end")
            self._switch.network("link", "add", "net", "type", "bridge")
        except AssertionError as error:
            self._stack.close()
            give_up([str(error)], "namespaces")
        self._switch.network("link", "set", "net", "up")
        return self

    def __exit__(self, *error: object) -> None:
        for name in [*self._booted]:
            self.kill(name)
        self._stack.close()

    # Hosts

    def boot(self, name: Name) -> None:
        """Boot a host, and plug it into the switch."""
        self._boots += 1
        host = Host(name)
        host.__enter__()
        self._booted[name] = booted = Booted(host)
        cable = f"{name}{self._boots}"
        peer = ["peer", "name", "eth0", "address", _HARDWARE[name], "netns", str(host.first)]
        self._switch.network("link", "add", cable, "type", "veth", *peer)
        self._switch.network("link", "set", cable, "master", "net", "up")
        host.network("addr", "add", f"{_ADDRESSES[name]}/24", "dev", "eth0")
        host.network("link", "set", "eth0", "up")
        if self._port:
            booted.proxy = host.proxy(self._port)
            booted.proxy.__enter__()

    def kill(self, name: Name) -> None:
        """Kill the first process of a host, so that all its processes are killed at once."""
        booted = self._booted.pop(name)
        booted.host.kill()
        if booted.proxy is not None:
            booted.proxy.plan = Refuse()  # A request that is held up does not arrive any more.
            self._thawed.set()
            booted.proxy.__exit__()
        if booted.agent is not None:
            booted.agent.wait()

    def start(self, *names: Name, place: Name) -> None:
        """Start the agents of these hosts, with the rendezvous at ``place``; boot a host that does not run."""
        self._place = place
        for name in names:
            if name not in self._booted:
                self.boot(name)
        for name in names:
            self._start(name)

    def _start(self, name: Name) -> None:
        booted = self._booted[name]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", f"--nproc-per-node={self._ranks}"]
        torchrun += ["--rdzv-backend=c10d", f"--rdzv-endpoint={_ADDRESSES[self._place]}:29400", "--rdzv-id=training"]
        torchrun += ["--rdzv-conf", f"{_RDZV},is_host={str(name == self._place).lower()}", "--max-restarts=20"]
        torchrun += [f"--local-addr={_ADDRESSES[name]}", "--monitor-interval=0.1"]
        given = [self._way, self._directory, str(self._folder), json.dumps(self._options)]
        paths = ":".join(filter(None, sys.path))
        environment = {
            **os.environ,
            "PYTHONPATH": paths,
            "GLOO_SOCKET_IFNAME": "eth0",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "OMP_NUM_THREADS": "1",
        }
        with open(self._folder / f"{name}.log", "ab") as log:
            command = [*torchrun, str(_SCRIPT), *given]
            booted.agent = booted.host.start(*command, env=environment, stdout=log, stderr=log)

    def recover(self, victim: Name, hosts: int, place: Name) -> None:
        """Do what a scheduler does after a host was lost, so that the training goes on on so many hosts.

        If it was the host of the rendezvous, the agent of the other host ends, and agents begin anew: two at ``place``.
        Else that agent starts a new group.
        """
        survivor = other(victim)
        if victim == self._place:
            assert 0 != self.ended(survivor), self.trace()
            self.start(*(BOTH if hosts == 2 else [survivor]), place=place if hosts == 2 else survivor)
        elif hosts == 2:
            self.start(victim, place=self._place)

    def grow(self, questions: list[Line]) -> list[Line]:
        """Add the host that is missing, while the training goes on; return the questions of all ranks."""
        for line in questions:
            _answer(line, ROAM)
        self.start(*(name for name in BOTH if name not in self._booted), place=self._place)
        return self.gather(len(BOTH))

    def ended(self, name: Name) -> int:
        """Wait until the agent of a host has ended, and return its exit code."""
        agent = self._booted[name].agent
        assert agent is not None
        try:
            code = agent.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.trace()) from None
        self._booted[name].agent = None
        return code

    def signal(self, line: Line, number: signal.Signals) -> None:
        """Send a signal to the process that has said the line, if it runs."""
        kill = ["kill", f"-{number.name[3:]}", str(line["pid"])]
        self._booted[line["host"]].host.start(*kill, stderr=subprocess.DEVNULL).wait()

    # The training

    def gather(self, hosts: int) -> list[Line]:
        """Wait until a group of all ranks of so many hosts is at its gate; return its questions, rank 0's first."""
        asked: dict[str, dict[int, dict[str, Any]]] = {}
        size = hosts * self._ranks

        def has_all() -> list[Line]:
            for line in self.read():
                if line["what"] == "asks" and line["size"] == size:
                    asked.setdefault(line["group"], {})[line["rank"]] = line
                elif line["what"] == "asks":
                    _answer(line, ROAM)
            return next(([ranks[n] for n in range(size)] for ranks in asked.values() if len(ranks) == size), [])

        return self.until(has_all)

    def until(self, found: Callable[[], T]) -> T:
        """Return what ``found`` returns, once that is true."""
        deadline = time.monotonic() + PATIENCE_S
        while not (what := found()):
            assert time.monotonic() < deadline, self.trace()
            for name, booted in self._booted.items():
                assert booted.agent is None or booted.agent.poll() in (None, 0), f"{name} ended\n{self.trace()}"
            time.sleep(0.01)
        return what

    def read(self) -> list[Line]:
        """Return the lines since the last call."""
        with open(self._folder / "log", "rb") as stream:
            stream.seek(self._read_to)
            data = stream.read()
        self._read_to += len(data)
        lines = [json.loads(line) for line in data.splitlines()]
        self.lines += lines
        return lines

    def count(self, questions: list[Line], clock: Name) -> tuple[list[Line], int]:
        """Let the training do one save; return its next questions, and how many operations the host did meanwhile."""
        proxy = self._booted[clock].proxy
        if proxy is not None:
            proxy.plan = Pass()
        for line in questions:
            _answer(line, AGAIN)
        again = self.gather(len(questions) // self._ranks)
        counted = next(int(line["operations"]) for line in again if line["host"] == clock)
        return again, counted if proxy is None else proxy.arrived

    def strike(self, questions: list[Line], act: Callable[[], object], *, clock: Name, at: int) -> str:
        """Let the training save. When a process on ``clock`` is about to do its operation number ``at``, call ``act``.

        Meanwhile that process is stopped, or its request is held up. Returns the operation.
        """
        proxy = self._booted[clock].proxy
        if proxy is not None:
            return self._strike_request(questions, act, proxy, at=at)
        clocked = next(line for line in questions if line["host"] == clock)
        for line in questions:
            _answer(line, at if line is clocked else ON)
        [stopped] = self.until(lambda: [line for line in self.read() if line["what"] == "stops"])
        act()
        if clock in self._booted:
            self.signal(clocked, signal.SIGCONT)
        return f"{stopped['event']} {stopped['path']}"

    def _strike_request(self, questions: list[Line], act: Callable[[], object], proxy: ChaosProxy, *, at: int) -> str:
        arrived = threading.Event()
        thawed = self._thawed = threading.Event()

        def halt() -> None:
            arrived.set()
            thawed.wait(PATIENCE_S)

        proxy.plan = Halt(halt, at)
        for line in questions:
            _answer(line, ON)
        self.until(arrived.is_set)
        act()
        thawed.set()
        return proxy.requests[-1]

    def end(self, questions: list[Line]) -> None:
        """Let the training end, and check that each agent ends well."""
        for line in questions:
            _answer(line, END)
        for name in [*self._booted]:
            assert 0 == self.ended(name), self.trace()
        self.read()

    def trace(self) -> str:
        """Return what a failed test shows."""
        said = [" ".join(f"{line[key]}" for key in line if key not in ("digest", "path")) for line in self.lines]
        logs = [f"--- {path.name}\n{path.read_text()[-6000:]}" for path in sorted(self._folder.glob("*.log"))]
        return "\n".join([*said[-60:], *logs])


def _answer(line: Line, answer: int) -> None:
    path = Path(line["path"])
    staged = path.with_suffix(".new")
    staged.write_text(str(answer))
    os.replace(staged, path)
