"""Two real hosts, one run: the job that a second one has taken over from wakes up, and changes nothing of it."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from support.host_me import Last, policy_of, undisturbed
from support.hosts import PATIENCE_S, Training, Trainings, two_hosts
from support.plain_format import PlainFormat
from support.sampling import instants
from support.servers.chaosproxy import ChaosProxy, Halt, Pass, Refuse, Stall
from support.servers.fixtures import Serve

from checkpointer import CheckpointManager
from checkpointer.restore.load import verify
from checkpointer.storage import open_storage

pytestmark = pytest.mark.slow

RUN = "digits"
LEASE_S = 0.4
"""How long the second training watches a first one that is stopped or cut off."""
OLD_STEPS, STEPS = 6, 10
"""The first training stops itself before its step 6, and the second one trains up to step 10."""
SERVERS = ["s3", "rclone", "sftp"]
TURNS = 30
"""How many of a training's requests to a server are held up in all."""


@attrs.frozen
class Place:
    """A directory that both hosts reach under one URL."""

    alpha: Trainings
    beta: Trainings
    url: str
    logs: Path
    options: dict[str, Any] | None = None
    network: ChaosProxy | None = None
    """How the first host reaches the server; None for a folder."""
    last: Last = "link"
    reserves: bool = False
    """Whether a writer that is stopped while it creates a name keeps it from others, for 15 minutes."""

    def fresh(self) -> Place:
        """Return an empty directory beside it."""
        return attrs.evolve(self, url=f"{self.url.rpartition('/')[0]}/{uuid.uuid4().hex}")

    def first(self, **arguments: Any) -> Training:
        """Start the training on the first host, which is up to date with its beat for a long time."""
        return self._start(self.alpha, {"steps": OLD_STEPS, **arguments})

    def second(self, **arguments: Any) -> Training:
        """Start the training on the second host, whose clock is an hour behind."""
        return self._start(self.beta, {"steps": STEPS, "shift_s": -3600.0, **arguments})

    def _start(self, host: Trainings, arguments: dict[str, Any]) -> Training:
        manager = {"run": RUN, "lease_s": LEASE_S, **arguments.pop("manager", {})}
        log = self.logs / f"{host.host.name}-{uuid.uuid4().hex[:8]}"
        return host.start(log, url=self.url, options=self.options, last=self.last, manager=manager, **arguments)

    def stopped_at(self, training: Training) -> str:
        """Return what a training that is stopped was about to do."""
        if self.network is not None:
            return f"request {self.network.arrived}, {self.network.requests[-1:]}"
        return " ".join(training.said[-1][1:]).replace(self.url, "")

    def reader(self) -> CheckpointManager:
        """Open the directory on this machine, without any claim."""
        return CheckpointManager(
            self.url, policy_of(self.last), run=RUN, format=PlainFormat(), storage_options=self.options
        )


@pytest.fixture(scope="module")
def booted() -> Iterator[tuple[Trainings, Trainings]]:
    with two_hosts() as both:
        yield both


@pytest.fixture
def hosts(booted: tuple[Trainings, Trainings]) -> Iterator[tuple[Trainings, Trainings]]:
    """Yield the two hosts, and kill what a failed test has left there."""
    yield booted
    for trainings in booted:
        trainings.clear()


@pytest.fixture
def folder(hosts: tuple[Trainings, Trainings], in_memory: Path, tmp_path: Path) -> Place:
    return Place(*hosts, url=str(in_memory / "run"), logs=tmp_path)


@pytest.fixture
def place(
    request: pytest.FixtureRequest, hosts: tuple[Trainings, Trainings], serve: Serve, tmp_path: Path
) -> Iterator[Place]:
    """Yield a directory on the server whose name is the parameter, or a folder."""
    if request.param == "folder":
        yield request.getfixturevalue("folder")
        return
    server = serve(request.param)
    alpha, beta = hosts
    with alpha.host.proxy(server.port) as network, beta.host.proxy(server.port):
        options, reserves = dict(server.storage_options), request.param == "rclone"
        yield Place(alpha, beta, server.fresh(), tmp_path, options, network, reserves=reserves)


everywhere = pytest.mark.parametrize("place", ["folder", *SERVERS], indirect=True)
on_servers = pytest.mark.parametrize("place", SERVERS, indirect=True)


@everywhere
def test_a_second_start_is_refused_while_the_first_is_alive(place: Place) -> None:
    """The second one ends with an error that names the first; the first one goes on as if it was alone."""
    first = place.first(steps=STEPS, gate=3, manager={"lease_s": 2.0})
    first.read_until("waits")
    second = place.second(manager={"lease_s": 2.0})
    assert 0 != second.wait()
    for text in (
        "RunInUseError",
        f"process {first.pid} on host alpha",
        "since",
        "heartbeat",
        "takeover=True",
        "TAKEOVER=1",
        RUN,
    ):
        assert text in second.errors
    first.open_gate()
    assert 0 == first.wait(), first.errors
    assert "Error" not in first.errors
    check_winner(place, first)


@everywhere
def test_a_takeover_fences_a_writer_that_is_alive(place: Place) -> None:
    """With ``takeover=True`` the second one begins at once; the first one ends at its next save."""
    first = place.first(steps=STEPS, gate=3)
    first.read_until("waits")
    second = place.second(manager={"takeover": True, "lease_s": 600.0}, gate=5)
    second.read_until("waits")
    first.open_gate()
    check_fenced(first, second)
    second.open_gate()
    check_winner(place, second)


@pytest.mark.parametrize("last", ["link", "copy"])
def test_a_writer_stopped_at_any_operation_in_a_folder_harms_nothing(folder: Place, last: Last) -> None:
    """It stops itself before each of its system calls in turn, another host takes over, and it goes on."""
    folder = attrs.evolve(folder, last=last)
    alone = folder.first()
    assert 0 == alone.wait(), alone.errors
    found = []
    for at in instants(alone.count() + 1):
        here = folder.fresh()
        first = here.first(stop_at=at)
        if first.await_stop():
            found += violations(here, first, is_alive=at % 2 == 0)
    assert not found, "\n\n".join(found)


@on_servers
def test_a_writer_stopped_at_any_request_harms_nothing(place: Place) -> None:
    """Requests, one in each turn, are held up in the network, and it is stopped, until another host has taken over."""
    place, network = attrs.evolve(place, last="copy"), place.network
    assert network is not None
    network.plan = Pass()
    alone = place.first()
    assert 0 == alone.wait(), alone.errors
    requests, found = network.arrived, []
    for turn in instants(min(requests, TURNS) + 1):
        here = place.fresh()
        with held(here, turn * requests // min(requests, TURNS)) as first:
            # A claim that is being created keeps every other process from the run: see docs/one-writer.md.
            is_claim = re.match(r"PUT \S*/terms/\S*\.json", "".join(network.requests[-1:]))
            if first is not None and not (here.reserves and is_claim):
                found += violations(here, first, is_alive=turn % 2 == 0)
    assert not found, "\n\n".join(found)


@pytest.mark.parametrize("cut", [Stall, Refuse], ids=["stalls", "refuses"])
@on_servers
def test_a_writer_that_was_cut_off_harms_nothing(place: Place, cut: type[Stall] | type[Refuse]) -> None:
    """Its network heals after another host has taken over; its next save raises the error."""
    assert place.network is not None
    first = place.first(gate=4)
    first.read_until("waits")
    place.network.plan = cut()
    first.open_gate()
    second = place.second(gate=6)
    second.read_until("waits")
    place.network.plan = Pass()
    check_fenced(first, second)
    second.open_gate()
    check_winner(place, second)


@everywhere
def test_on_the_host_of_a_process_that_is_gone_the_next_one_begins_at_once(place: Place) -> None:
    """It sees that the process has ended, so it does not wait for the lease."""
    first = place.first(gate=4)
    first.read_until("waits")
    first.kill()
    again = place.first(steps=5, manager={"lease_s": 600.0})
    assert 0 == again.wait(), again.errors
    assert [3] == again.steps("restored")


@contextlib.contextmanager
def held(place: Place, at: int) -> Iterator[Training | None]:
    """Start the first training, and stop it as soon as its request ``at`` is under way; None if it has fewer."""
    assert place.network is not None
    arrived, thawed = threading.Event(), threading.Event()

    def halt() -> None:
        arrived.set()
        thawed.wait(PATIENCE_S)

    place.network.plan = Halt(halt, at)
    first = place.first()
    try:
        if first.await_request(arrived):
            first.stop()
            first.thaws.append(thawed.set)
            yield first
        else:
            yield None
    finally:
        thawed.set()


def violations(place: Place, first: Training, *, is_alive: bool) -> list[str]:
    """Let the second training take over, and the first one go on: when it has ended, or while it is alive.

    Returns what is wrong then.
    """
    clue = f"stopped at {place.stopped_at(first)} ({'the winner trains' if is_alive else 'the winner has ended'})"
    second = place.second(gate=8 if is_alive else 0)
    second.read_until("waits")
    first.go_on()
    first.wait()
    second.open_gate()
    second.wait()
    found = []
    for check in (
        functools.partial(check_takeover, first, second),
        functools.partial(check_loser, first, second),
        functools.partial(check_winner, place, second),
    ):
        try:
            check()
        except (Exception, AssertionError) as error:
            found.append(f"{clue}: {str(error) or repr(error)}"[:2000])
    return found


def check_takeover(first: Training, second: Training) -> None:
    """Check that the second training goes on from the last acknowledged save, or from one that was under way."""
    acknowledged = max(first.steps("saved", until=first.said_before), default=0)
    assert second.steps("restored") in ([acknowledged], [acknowledged + 1])


def check_loser(first: Training, second: Training) -> None:
    """Check how the first training ended: with an error that names the second, unless it had nothing left to save."""
    saved = first.steps("saved", since=first.said_before)
    assert len(saved) <= 1, f"it saved {saved} without an error"
    if first.code == 0:
        restored = first.steps("restored", since=first.said_before)
        assert restored == [STEPS] or (saved in ([], [OLD_STEPS]) and first.steps("saved")[-1:] == [OLD_STEPS])
    elif "RunInUseError" in first.errors:  # It was stopped before it had claimed the run.
        assert [] == first.steps("saved")
    else:
        check_fenced(first, second)


def check_fenced(first: Training, second: Training) -> None:
    """Check that the first training ends with an error about the second one."""
    assert 1 == first.wait()
    last_lines = first.errors[first.errors.rfind("FencedError") :]
    for text in ("FencedError", f"process {second.pid} on host beta", "term", "since", RUN):
        assert text in last_lines, f"{text!r} is not in {first.errors}"


def check_winner(place: Place, winner: Training) -> None:
    """Check that the run is the winner's: its last state, all that it kept, its aliases, and a later training."""
    steps = STEPS
    assert 0 == winner.wait(), winner.errors
    [since] = winner.steps("restored")
    trained_by = ["alpha"] * since + [winner.host] * (steps - since)
    [kept] = [json.loads(line[1]) for line in winner.said if line[0] == "kept"]
    storage = open_storage(place.url, "", place.options)
    with place.reader() as reader:
        restored = reader.restore()
        assert restored is not None
        assert (steps, undisturbed(steps)) == (restored.step, restored.state["weights"])
        assert trained_by == restored.state["trained_by"]
        there = {record.name: [record.digest, dict(record.metrics)] for record in reader.records}
        assert kept == {name: what for name, what in there.items() if name in kept}
        for record in reader.records:
            # An earlier checkpoint that the old writer was about to remove, but did not, may be left.
            assert record.name in kept or record.step <= since
            verify(storage, record)
        newest, best = reader.last, reader.best
        assert newest is not None
        assert best is not None
        assert steps == newest.step
        [aliases] = [line[1:] for line in winner.said if line[0] == "aliases"]
        for alias, record in zip(aliases, (newest, best), strict=True):
            with storage.open(alias) as stream:
                assert record.step == json.load(stream)["step"], f"{alias} is not {record.name}"
    following = place.first(steps=steps + 2)
    assert 0 == following.wait(), following.errors
    assert [steps] == following.steps("restored")
    with place.reader() as reader:
        restored = reader.restore()
        assert restored is not None
        assert undisturbed(steps + 2) == restored.state["weights"]
        assert [*trained_by, "alpha", "alpha"] == restored.state["trained_by"]
