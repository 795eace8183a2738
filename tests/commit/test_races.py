"""Several processes save the same steps under the same names at once: one writer per name, and no bytes mixed."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.plain_format import PlainFormat
from support.servers.fixtures import Serve

from checkpointer import CheckpointManager, EverySteps, KeepAll, Policy
from checkpointer.commit import index
from checkpointer.commit.lease import Lease, claim_term
from checkpointer.commit.terms import Term, read_claim
from checkpointer.errors import FencedError
from checkpointer.ports import SupportsSweep
from checkpointer.restore import load as restoring
from checkpointer.storage import open_storage
from checkpointer.storage.owner import new_owner
from checkpointer.storage.remote import FsspecStorage

pytestmark = pytest.mark.slow

STEPS = 8


def race(url: str, options: dict[str, Any], num_writers: int, names: str) -> dict[str, list[str]]:
    """Return what each writer said, by its id; all start together."""
    children = {
        f"w{number}": subprocess.Popen(
            [sys.executable, "-m", "support.race_me", url, json.dumps(options), f"w{number}", str(STEPS), names],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(num_writers)
    }
    said = {}
    try:
        for child in children.values():
            assert child.stdout is not None
            assert child.stderr is not None
            assert "ready\n" == child.stdout.readline(), child.stderr.read()
        for child in children.values():
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        for writer, child in children.items():
            out, err = child.communicate(timeout=120)
            assert 0 == child.returncode, err
            said[writer] = out.splitlines()
    finally:
        for child in children.values():
            child.kill()
            child.communicate()
    return said


def check(url: str, options: dict[str, Any], said: dict[str, list[str]], *, losers_get_errors: bool) -> None:
    """Every acknowledged checkpoint is there with the bytes of its writer, and with no other bytes."""
    storage = open_storage(url, new_owner(), options)
    records = {entry.record.name: entry.record for entry in index.load(storage).entries.values()}
    acknowledged = Counter(line.split()[1] for lines in said.values() for line in lines if line.startswith("saved"))
    assert not [name for name, times in acknowledged.items() if times > 1], said
    assert acknowledged
    for writer, lines in said.items():
        failures = {line.split(maxsplit=1)[1] for line in lines if line.startswith("failed")}
        assert failures <= ({"NameTakenError"} if losers_get_errors else set()), sorted(failures)
        for name in (line.split()[1] for line in lines if line.startswith("saved")):
            restored = restoring.load(
                storage, lambda record: PlainFormat(), records[name], weights_only=True, map_location="cpu"
            )
            assert writer == restored.state["writer"], (name, said)
    assert isinstance(storage, SupportsSweep)
    storage.close()


@pytest.mark.parametrize("names", ["same", "versions"])
def test_writers_on_a_local_disk(tmp_path: Path, names: str) -> None:
    """The filesystem refuses the second."""
    check(str(tmp_path), {}, race(str(tmp_path), {}, 4, names), losers_get_errors=True)


@pytest.mark.parametrize("names", ["same", "versions"])
@pytest.mark.parametrize("server", ["s3", "rclone", "ssh", "webdav"])
def test_writers_on_a_server(serve: Serve, server: str, names: str) -> None:
    """With conditional PUT, without, over ssh, and where renames refuse what is there."""
    running = serve(server)
    url, options = running.fresh(), dict(running.storage_options)
    check(url, options, race(url, options, 3, names), losers_get_errors=True)


@pytest.mark.parametrize(("server", "how"), [("s3", "refused by the server"), ("rclone", "by claims")])
def test_the_probe_finds_out_whether_the_server_refuses(serve: Serve, server: str, how: str) -> None:
    """Both accept the condition; one of them ignores it."""
    running = serve(server)
    storage = open_storage(running.fresh(), new_owner(), running.storage_options)

    assert isinstance(storage, FsspecStorage)
    assert storage.capabilities()["create"].startswith(how)


@pytest.mark.parametrize("server", ["s3", "rclone"])
def test_processes_that_claim_a_term_at_the_same_moment_get_different_ones(serve: Serve, server: str) -> None:
    """With conditional PUT the server decides, without it the claims do; each file of a term names its holder."""
    running, writers = serve(server), 4
    url, barrier = running.fresh(), threading.Barrier(writers)

    def claim(number: int) -> list[Term]:
        owner = f"host{number}_0000_1~{number}~1~{number:012x}"
        storage = open_storage(url, owner, dict(running.storage_options))
        assert isinstance(storage, FsspecStorage)
        storage.capabilities()
        barrier.wait()
        return [claim_term(storage, "r", "", owner, Lease(takeover=True), is_new=False) for _ in range(2)]

    with ThreadPoolExecutor(writers) as threads:
        held = [term for terms in threads.map(claim, range(writers)) for term in terms]
    assert [*range(1, 2 * writers + 1)] == sorted(term.number for term in held)
    for term in held:
        assert term.owner == read_claim(term.storage, term.folder, term.number, None).owner


def test_two_holders_of_one_term_mix_no_bytes_and_are_both_fenced(serve: Serve) -> None:
    """Without conditional PUT a claim that was under way for 15 minutes replaces that of the next process."""
    running = serve("rclone")
    url, policy = running.fresh(), Policy(EverySteps(1), [KeepAll()])

    def opened(name: str) -> CheckpointManager:
        options: dict[str, Any] = {"storage_options": dict(running.storage_options), "takeover": True, "run": "r"}
        return CheckpointManager(url, policy, state=lambda: {"by": name}, format=PlainFormat(), **options)

    late = opened("late")
    term = late.session._directory.journal.term
    assert term is not None
    path = f"{term.folder}/1.json"
    with term.storage.open(path) as stream:
        claim = stream.read()
    term.storage.delete(path)
    other = opened("other")
    term.storage.write(path, claim)
    for step in (1, 2):
        late.observe({}, step=step, epoch=0, epoch_end=False)
        other.observe({}, step=step, epoch=0, epoch_end=False)
    third = opened("third")
    assert 4 == len(third.records)
    for record in third.records:
        restored = third.restore(record.name)
        assert restored is not None
        assert restored.state["by"] in ("late", "other")
    for fenced in (late, other):
        with pytest.raises(FencedError):
            fenced.observe({}, step=3, epoch=0, epoch_end=False)
    for manager in (late, other, third):
        manager.close()
