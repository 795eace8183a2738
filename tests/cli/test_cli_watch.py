"""``checkpointer watch`` and ``doctor``: a live run seen from outside, and a place tried before one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import mounts
from support.commands import POLICY, command, snapshot, train

from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy
from checkpointer.errors import StorageError
from checkpointer.records.status import TrainingStatus
from checkpointer.testing import MemoryStorage
from checkpointer.tools.doctor import diagnose
from checkpointer.tools.watch import lines_of, watch

TRAINING = """
import sys, time
from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy
policy = Policy(EverySteps(100), [KeepLast(2)])
mirror = sys.argv[2] if len(sys.argv) > 2 else None
with CheckpointManager(sys.argv[1], policy, state=lambda: {"w": 1}, lease_s=0.4, mirror=mirror) as manager:
    manager.restore()
    for step in range(1, 10**9):
        manager.observe({"loss": 1 / step}, step=step, epoch=0, epoch_end=False)
        if step >= 250:
            print(step, flush=True)
            time.sleep(0.5)
"""


@pytest.fixture
def training(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A training in another process, which has saved step 200 and is beyond step 250, with a mirror."""
    argv = [sys.executable, "-c", TRAINING, str(tmp_path / "run"), str(tmp_path / "mirror")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def eventually(look: Any) -> Any:
    """Return what a look returns, as soon as it is true."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if found := look():
            return found
        time.sleep(0.05)
    pytest.fail("it did not come")


def test_a_live_run_is_seen_from_another_process_and_a_killed_one_too(
    training: subprocess.Popen[str], tmp_path: Path
) -> None:
    """The last step, the last checkpoint, the next save, the mirror, the disk; and nothing is changed."""

    def looked() -> Any:
        said = command("watch", tmp_path / "run", "--once", "--json")
        assert (0, "") == (said.code, said.err)
        (seen,) = said.data
        return seen if seen["status"] is not None and seen["status"]["step"] >= 250 else None

    seen = eventually(looked)
    assert ("alive", True, 200) == (seen["state"], seen["alive"], seen["newest"]["step"])
    assert 250 <= seen["status"]["step"] < 300
    assert "step 300" == seen["due"]
    assert 0 <= seen["due_in_s"] < 60
    assert (str(tmp_path / "mirror"), True) == (seen["status"]["mirror"], seen["free"] > 0)
    text = command("watch", tmp_path / "run", "--once").out
    assert f"process {training.pid} on this host" in text
    assert "at step 300 (in about" in text
    assert "the mirror" not in text
    mirror = eventually(lambda: (tmp_path / "mirror" / ".checkpointer" / "terms").exists())
    assert mirror
    assert 0 == command("watch", tmp_path / "mirror", "--once").code

    training.send_signal(signal.SIGKILL)
    training.wait()
    before = snapshot(tmp_path)
    said = command("watch", tmp_path / "run")
    assert (1, True) == (said.code, "ended without closing: killed" in said.out)
    assert before == snapshot(tmp_path)


def test_a_run_that_was_closed_is_not_alive(tmp_path: Path) -> None:
    """The exit code says so, and the text says what is there."""
    folder = train(tmp_path / "run", 0.5)
    said = command("watch", folder)
    assert (1, True) == (said.code, "ended; its manager was closed" in said.out)
    assert "epoch=0-step=10.ckpt, step 10" in said.out
    said = command("watch", tmp_path / "rum")
    assert (2, True) == (said.code, "did you mean" in said.err)


def test_a_run_that_has_not_saved_yet_is_there(tmp_path: Path) -> None:
    """Its process has marked the directory."""
    with CheckpointManager(tmp_path / "run", POLICY, state=dict):
        said = command("watch", tmp_path / "run", "--once")
        assert (0, True) == (said.code, "not saved yet: alive" in said.out and "nothing yet" in said.out)


def test_a_run_on_another_machine_is_alive_while_its_heartbeat_is_young(tmp_path: Path) -> None:
    """Its process cannot be looked at from here."""
    with CheckpointManager("memory://watched/run", POLICY, state=dict) as manager:
        manager.observe({"loss": 0.5}, step=10, epoch=0)
        assert 0 == command("copy", "memory://watched/run", tmp_path / "copy").code
        storage = MemoryStorage()
        inner = manager._directory.storage
        for path in inner.list():
            with inner.open(path) as stream:
                storage.write(path, stream.read().replace(os.uname().nodename.encode(), b"elsewhere"))
    key = next(path for path in storage.list() if path.endswith("/1.json")).removesuffix(".json")
    now = 1000.0
    status = TrainingStatus(time=now, step=17, writing="a.ckpt", written=10**9, expected=3 * 10**9, due="step 20")
    for age, state in ((5.0, "alive"), (500.0, "silent")):
        storage.write(f"{key}.beat", f"7\n{status.to_json()}".encode())
        (seen,) = watch(storage, now + age)
        assert state == seen.state
    lines = dict(lines_of(watch(storage, now + 5.0)[0], now + 5.0))
    assert ("17, 5 s ago", "a.ckpt, 1.0 GB of about 3.0 GB") == (lines["step"], lines["writing"])


@pytest.mark.parametrize("beat", [b"", b"7", b"7\n{", b"7\n[]", b'7\n{"time": "x"}', b'7\n{"step": 3}', b"\xff\n\xff"])
def test_a_heartbeat_of_any_content_is_read(beat: bytes) -> None:
    """Older versions write only a number, and any program may write the file."""
    storage = MemoryStorage()
    with CheckpointManager(storage, POLICY, state=dict) as manager:
        manager.observe({"loss": 0.5}, step=10, epoch=0)
        key = next(path for path in storage.list() if path.endswith("/1.json")).removesuffix(".json")
        storage.write(f"{key}.beat", beat)
        (seen,) = watch(storage, time.time())
        assert ("alive", None) == (seen.state, seen.status)
        assert seen.due == "" or "step" in seen.due


def test_without_a_heartbeat_the_next_save_follows_from_the_noted_policy() -> None:
    """The policy says when, and the newest checkpoint says since when."""
    storage = MemoryStorage()
    with CheckpointManager(storage, Policy(EverySteps(100), [KeepLast(1)]), state=dict) as manager:
        manager.observe({}, step=100, epoch=0, epoch_end=False)
        (seen,) = watch(storage, time.time())
    assert "step 200" == seen.due


def test_a_heartbeat_holds_no_manager() -> None:
    """A manager that is dropped without close() is garbage-collected, and its heartbeat ends."""
    code = textwrap.dedent("""
        import gc, threading, time
        from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy
        from checkpointer.testing import MemoryStorage
        manager = CheckpointManager(MemoryStorage(), Policy(EverySteps(1), [KeepLast(1)]), state=dict, lease_s=0.1)
        manager.observe({}, step=1, epoch=0)
        assert "checkpointer-heartbeat" in [thread.name for thread in threading.enumerate()]
        del manager
        gc.collect()
        end = time.monotonic() + 30
        while threading.active_count() > 1 and time.monotonic() < end:
            time.sleep(0.01)
        print([thread.name for thread in threading.enumerate()])
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "['MainThread']\n" == done.stdout


# doctor


def test_doctor_says_what_a_save_takes_and_leaves_nothing(tmp_path: Path) -> None:
    """In a directory that need not exist."""
    said = command("doctor", tmp_path / "a" / "run", "--size", "200MB")
    assert (0, "") == (said.code, said.err)
    topics = [line[6:].partition(":")[0] for line in said.out.splitlines()]
    for topic in ("write", "replace", "create", "fsync", "small files", "throughput", "clock", "space", "a save"):
        assert topic in topics
    assert "200.0 MB take about" in said.out
    assert [] == [*tmp_path.iterdir()]


def test_doctor_leaves_a_directory_as_it_was(tmp_path: Path) -> None:
    """Also while a training runs there."""
    with CheckpointManager(tmp_path / "run", POLICY, state=dict) as manager:
        manager.observe({"loss": 0.5}, step=10, epoch=0)
        before = snapshot(tmp_path)
        assert 0 == command("doctor", tmp_path / "run").code
        assert before == snapshot(tmp_path)


def test_doctor_finds_too_little_room(tmp_path: Path) -> None:
    """Before the run does."""
    said = command("doctor", tmp_path, "--size", "900000TB", "--json")
    assert (1, ["space"]) == (said.code, [one["topic"] for one in said.data if one["level"] == "BAD"])


def test_doctor_of_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    """The error is the one that a training would have."""

    class ReadOnly(MemoryStorage):
        def prepare(self) -> None:
            raise StorageError("cannot write to it")

        def sweep(self) -> int:
            return 0

        def close(self) -> None:
            pass

    (found,) = diagnose(ReadOnly())
    assert ("BAD", "cannot write to it") == (found.level, found.text)
    (tmp_path / "file").write_text("x")
    assert "is a file" in command("doctor", tmp_path / "file").err


def test_doctor_finds_the_unrelated_package_of_the_same_import_name(tmp_path: Path) -> None:
    """Both have the import name checkpointer, and break each other."""
    info = tmp_path / "checkpointer-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: checkpointer\nVersion: 2.0\n")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    argv = [sys.executable, "-m", "checkpointer", "version", "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, env=env)
    assert 1 == done.returncode, done.stderr
    assert "unrelated package 'checkpointer' 2.0" in json.loads(done.stdout)["problems"][0]


@pytest.mark.parametrize("left", [0, 4 * mounts.MIB])
def test_on_a_full_disk_doctor_says_so_and_watch_sees_the_run(tmp_path: Path, left: int) -> None:
    """Nothing of the trial stays there, and the run is as it was."""
    with mounts.tmpfs(tmp_path, 24 * mounts.MIB) as disk:
        with CheckpointManager(disk / "run", POLICY, state=dict) as manager:
            manager.observe({"loss": 0.5}, step=10, epoch=0)
            with mounts.filled(disk, left):
                before = snapshot(disk / "run")
                said = command("doctor", disk / "run", "--size", "1GB")
                assert (1, "") == (said.code, said.err)
                assert any(line.startswith("BAD") and "No space left" in line for line in said.out.splitlines()), said
                assert "Errno" not in said.out
                seen = command("watch", disk / "run", "--once")
                assert (0, "", True) == (seen.code, seen.err, "step 10" in seen.out), seen
                assert before == snapshot(disk / "run")
        assert (1, True) == ((seen := command("watch", disk / "run")).code, "its manager was closed" in seen.out)


def test_in_a_read_only_place_doctor_says_so_and_watch_sees_the_run(tmp_path: Path) -> None:
    """As a training that was started there would."""
    train(tmp_path / "run", 0.5)
    with mounts.read_only(tmp_path / "run", tmp_path) as folder:
        said = command("doctor", folder)
        assert (1, "", True) == (said.code, said.err, said.out.startswith("BAD")), said
        assert ("Read-only file system" in said.out, "Errno" in said.out) == (True, False)
        seen = command("watch", folder, "--once")
        assert (1, "", True) == (seen.code, seen.err, "step 10" in seen.out), seen
