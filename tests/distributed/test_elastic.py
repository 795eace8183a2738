"""Torchrun on two hosts: a host or a rank is killed within a save, and the training goes on from what it has saved."""

from __future__ import annotations

import functools
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.elastic import BOTH, Cluster
from support.elastic_me import undisturbed
from support.sampling import EVERY, FIRST, instants
from support.servers.fixtures import Serve

from checkpointer import CheckpointManager
from checkpointer.restore.load import verify
from checkpointer.storage import open_storage

pytestmark = pytest.mark.slow

TENTHS = instants(11)
"""The tenths of a save at which it is struck: all, or one."""
WAYS = [("replicated", "folder"), ("sharded", "folder"), ("sharded", "s3"), ("replicated", "s3")]
"""DDP with files and FSDP2 with folders; in a shared folder and in a bucket."""


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path, in_memory: Path, serve: Serve) -> Iterator[dict[str, Any]]:
    """Yield where the training is, as arguments of a cluster."""
    notes = tmp_path / "notes"
    notes.mkdir()
    if request.param == "folder":
        yield {"folder": notes, "directory": str(in_memory / "run")}
    else:
        server = serve(request.param)
        yield {
            "folder": notes,
            "directory": server.fresh(),
            "options": dict(server.storage_options),
            "port": server.port,
        }


@pytest.mark.parametrize(("way", "place"), WAYS if EVERY == 1 else [WAYS[FIRST % 4]], indirect=["place"])
def test_a_host_that_is_killed_within_a_save_loses_nothing(way: str, place: dict[str, Any]) -> None:
    """Either host, at each tenth of a save; the training goes on on one host or on two, and the other comes back."""
    with Cluster(way=way, **place) as cluster:
        cluster.start(*BOTH, place=BOTH[(FIRST // 2 + FIRST // 4) % 2])
        questions = cluster.gather(2)
        for tenth in TENTHS:
            victim, hosts = BOTH[tenth % 2], 1 + tenth // 2 % 2
            clock = victim if way == "sharded" and "port" in place else "alpha"
            questions, operations = cluster.count(questions, clock)
            at = max(1, tenth * operations // 10)
            where = cluster.strike(questions, functools.partial(cluster.kill, victim), clock=clock, at=at)
            print(f"{way}: {victim} killed at {clock}'s operation {at} of {operations} ({where}), on with {hosts}")
            cluster.recover(victim, hosts, victim if way == "replicated" else "beta")
            questions = cluster.gather(hosts)
            check_lines(cluster)
            if hosts == 1 and tenth != TENTHS[-1]:
                questions = cluster.grow(questions)
        cluster.end(questions)
        check_lines(cluster)
        check_directory(cluster, place)


@pytest.mark.parametrize(("way", "place"), WAYS if EVERY == 1 else [WAYS[(FIRST + 2) % 4]], indirect=["place"])
def test_a_rank_that_is_killed_within_a_save_loses_nothing(way: str, place: dict[str, Any]) -> None:
    """One of two on a host: the other one ends, and torchrun starts both again. They do not wait for the lease."""
    with Cluster(way=way, ranks=2, lease_s=600, **place) as cluster:
        cluster.start("alpha", place="alpha")
        questions = cluster.gather(1)
        for tenth in TENTHS:
            questions, operations = cluster.count(questions, "alpha")
            killed, at = questions[tenth % 2], max(1, tenth * operations // 10)
            kill = functools.partial(cluster.signal, killed, signal.SIGKILL)
            where = cluster.strike(questions, kill, clock="alpha", at=at)
            print(f"{way}: rank {killed['rank']} killed at operation {at} of {operations} ({where})")
            questions = cluster.gather(1)
            check_lines(cluster)
        cluster.end(questions)
        check_lines(cluster)
        check_directory(cluster, place)


def check_lines(cluster: Cluster) -> None:
    """Check that each group went on from what was acknowledged, or from the save that was struck, to the bit."""
    acknowledged: int = 0
    digests = undisturbed(max((line["step"] for line in cluster.lines if "step" in line), default=0))
    resumed: dict[str, int] = {}
    for line in cluster.lines:
        if "digest" in line:
            assert digests[line["step"]] == line["digest"], f"{line}\n{cluster.trace()}"
        if line["what"] == "saved":
            acknowledged = max(acknowledged, line["step"])
        elif line["what"] == "resumes" and line["group"] not in resumed:
            assert line["step"] in (acknowledged, acknowledged + 1), f"{line}\n{cluster.trace()}"
            acknowledged = resumed[line["group"]] = line["step"]
        elif line["what"] == "resumes":
            assert resumed[line["group"]] == line["step"], cluster.trace()


def check_directory(cluster: Cluster, place: dict[str, Any]) -> None:
    """Check that the newest checkpoint is that of the last step, each is whole, and no other file is left."""
    url, options = place["directory"], place.get("options")
    with CheckpointManager(url, storage_options=options) as reader:
        assert reader.last is not None
        assert max(line["step"] for line in cluster.lines if line["what"] == "ends") == reader.last.step
        storage = open_storage(url, "", options)
        for record in reader.records:
            verify(storage, record)
        assert place.get("options") or not [*Path(url, ".checkpointer/staging").glob("*")], "the part of a killed save"
        names = {record.name for record in reader.records}
        assert names == {path.partition("/")[0] for path in storage.list() if not path.startswith(".checkpointer/")}
