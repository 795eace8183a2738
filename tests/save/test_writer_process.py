"""The writer process: it writes what the thread would write, and its end at any moment loses nothing."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointer import CheckpointManager, EverySteps, KeepAll, Policy
from checkpointer.errors import SaveError
from checkpointer.formats import open_format, shared_memory
from checkpointer.formats.archive import LARGE as LARGE_RECORD
from checkpointer.formats.archive import Archive
from checkpointer.formats.snapshot import Snapshots
from checkpointer.save import writer_process, writer_program
from checkpointer.storage.digests import DigestWriter
from checkpointer.storage.local import LocalStorage
from checkpointer.storage.owner import new_owner

pytestmark = pytest.mark.skipif(not shared_memory.is_possible(), reason="needs Linux, and two cores")
LARGE = {"w": torch.arange(17 << 20, dtype=torch.float32), "odd": torch.ones(300_001), "one": torch.ones(())}
PATIENCE_S = 60.0
OTHER = r"printf '\005\000\000\000\000\000\000\000z\0030.0' >&0; exec sleep 20"
"""A program that says that its version is 0.0."""


class Training:
    """A loop whose large state changes at each step."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.step = 0
        self.extra = torch.ones(0)
        self.path = path
        self.manager = CheckpointManager(
            path, Policy(EverySteps(1), [KeepAll()]), state=self.state, background="wait", **options
        )

    def state(self) -> dict[str, Any]:
        LARGE["one"].fill_(self.step)
        return {**LARGE, "view": LARGE["w"][5:9], "extra": self.extra, "text": "x", "step": self.step}

    def save(self) -> None:
        """Begin a save."""
        self.step += 1
        self.manager.observe({}, self.step, epoch=0, epoch_end=False)

    def saved(self) -> dict[str, Any]:
        """Return the last checkpoint as plain torch reads it, after the zip file's own checksums were checked."""
        path = self.path / self.manager.records[-1].name
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
        state: dict[str, Any] = torch.load(path, weights_only=True, mmap=True)
        return state

    def check(self) -> None:
        """Check that the last checkpoint has the state of the last step, and that its digest is right."""
        saved = self.saved()
        assert self.step == saved["step"] == saved["one"].item()
        assert all(torch.equal(LARGE[name], saved[name]) for name in LARGE)
        assert saved["view"].untyped_storage().data_ptr() == saved["w"].untyped_storage().data_ptr()
        restored = self.manager.restore()
        assert restored is not None
        assert self.step == restored.step


@contextlib.contextmanager
def training(path: Path, **options: Any) -> Iterator[Training]:
    """Give a training, and close its manager in the end."""
    loop = Training(path, **options)
    with loop.manager:
        yield loop


def process_of(trainer: int) -> int | None:
    """Return the id of the writer process of a trainer, if there is one."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == trainer and b"writer_program" in (folder / "cmdline").read_bytes():
                return int(folder.name)
    return None


def the_process() -> int:
    """Return the id of our writer process."""
    found = process_of(os.getpid())
    assert found is not None
    return found


def test_another_process_writes_a_large_snapshot(tmp_path: Path) -> None:
    """It is not in our process group, so that Ctrl-C does not reach it, and it ends with the manager.

    The checkpoint has the state of its step, although the loop changes the state while the process writes.
    """
    with training(tmp_path) as loop:
        for _ in range(2):
            loop.save()
            LARGE["odd"].zero_()
            loop.manager.wait()
            LARGE["odd"].fill_(1)
            loop.check()
        assert os.getpgid(the_process()) != os.getpgrp()
    assert process_of(os.getpid()) is None


def test_a_small_snapshot_needs_no_process(tmp_path: Path) -> None:
    """A second interpreter would cost more than it gains."""
    small = {"w": torch.ones(3)}
    policy = Policy(EverySteps(1), [KeepAll()])
    with CheckpointManager(tmp_path, policy, state=lambda: small, background="wait") as manager:
        manager.observe({}, 1, epoch=0, epoch_end=False)
        manager.wait()
        assert process_of(os.getpid()) is None


def test_a_killed_process_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is killed when it has not answered yet: the thread writes the same checkpoint, and those after it."""
    with training(tmp_path) as loop:
        loop.save()
        loop.manager.wait()
        pid = the_process()
        os.kill(pid, signal.SIGSTOP)
        loop.save()
        time.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
        loop.manager.wait()
        loop.check()
        assert f"the writer process {pid} has ended (Killed)" in caplog.text
        loop.save()
        loop.manager.wait()
        loop.check()
        assert process_of(os.getpid()) is None
        assert [1, 2, 3] == [record.step for record in loop.manager.records]


@pytest.mark.parametrize("delay_ms", [None, 20], ids=["before it begins", "while it writes"])
def test_a_stopped_process_is_waited_for_with_a_bound(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, delay_ms: int | None
) -> None:
    """The thread takes over, as for one that has ended. The process does not continue, whatever signals it gets."""
    with training(tmp_path) as loop:
        loop.save()
        loop.manager.wait()
        pid = the_process()
        monkeypatch.setattr(writer_process, "STALLED_S", 1)  # Later, because a loaded machine may need more for a save.
        if delay_ms is None:
            os.kill(pid, signal.SIGSTOP)
        loop.save()
        if delay_ms is not None:
            time.sleep(delay_ms / 1000)
            with contextlib.suppress(ProcessLookupError):  # It has made no progress without the signal.
                os.kill(pid, signal.SIGSTOP)
        loop.manager.wait()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        loop.check()
        assert process_of(os.getpid()) is None
        assert f"the writer process {pid} was ended, because it has made no progress for 1 s" in caplog.text
        loop.save()
        loop.manager.wait()
        loop.check()
        assert [1, 2, 3] == [record.step for record in loop.manager.records]


def test_a_process_that_is_stopped_for_a_moment_goes_on(tmp_path: Path) -> None:
    """It continues within the bound, and writes the checkpoint."""
    with training(tmp_path) as loop:
        loop.save()
        loop.manager.wait()
        pid = the_process()
        os.kill(pid, signal.SIGSTOP)
        loop.save()
        time.sleep(0.3)
        os.kill(pid, signal.SIGCONT)
        loop.manager.wait()
        loop.check()
        assert pid == the_process()


@pytest.mark.slow
@pytest.mark.parametrize("delay_ms", [0, 20, 80])
def test_it_may_be_killed_at_any_moment(tmp_path: Path, delay_ms: int) -> None:
    """Every checkpoint is whole, also one that the process had written in part, or whose folder is not synced yet."""
    with training(tmp_path) as loop:
        loop.save()
        loop.manager.wait()
        pid = the_process()
        loop.save()
        time.sleep(delay_ms / 1000)
        os.kill(pid, signal.SIGKILL)
        loop.manager.wait()
        loop.check()
        loop.save()
        loop.manager.wait()
        loop.check()
        assert [1, 2, 3] == [record.step for record in loop.manager.records]


def test_an_error_of_the_disk_is_reported_as_from_the_thread(tmp_path: Path) -> None:
    """The process may write 1 MB only. The save fails, the checkpoint before it counts, and the next save works."""
    with training(tmp_path) as loop:
        loop.save()
        loop.manager.wait()
        pid = the_process()
        limits = resource.prlimit(pid, resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
        loop.save()
        with pytest.raises(SaveError, match="File too large"):
            loop.manager.wait()
        assert [1] == [record.step for record in loop.manager.records]
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
        loop.save()
        loop.manager.wait()
        loop.check()
        assert pid == the_process()


def test_it_ends_when_the_trainer_is_killed(tmp_path: Path) -> None:
    """Nothing is left running, and the next trainer finds the checkpoint."""
    script = """
import os, signal, sys
from pathlib import Path
from test_writer_process import Training, the_process
loop = Training(Path(sys.argv[1]))
loop.save()
loop.manager.wait()
print(the_process(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    folder = os.path.dirname(__file__)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])}
    ended = subprocess.run(
        [sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, env=environment, check=False
    )
    pid, deadline = int(ended.stdout), time.monotonic() + PATIENCE_S
    while os.path.exists(f"/proc/{pid}/exe") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{pid}/exe")
    with CheckpointManager(tmp_path, Policy(EverySteps(1), [KeepAll()]), state=dict) as manager:
        assert [1] == [record.step for record in manager.records]


@pytest.mark.parametrize(
    ("name", "program", "warning"),
    [
        ("python", "exit 1", "no writer process can be started (it has ended at once)"),
        ("python", "exec sleep 20", "no writer process can be started (timed out)"),
        ("python", OTHER, "its version is 0.0, and that of the trainer is"),
        ("app", "exit 1", None),
    ],
    ids=["broken", "silent", "other", "embedded"],
)
def test_a_process_that_cannot_be_started_is_not_needed(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    program: str,
    warning: str | None,
) -> None:
    """The thread writes. A program that embeds Python is not started at all, because it could do anything."""
    executable = tmp_path / name
    executable.write_text(f"#!/bin/sh\n{program}\n")
    executable.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(executable))
    monkeypatch.setattr(writer_process, "START_S", 0.3)
    with caplog.at_level(logging.WARNING), training(tmp_path / "run") as loop:
        loop.save()
        loop.manager.wait()
        loop.check()
    assert warning in caplog.text if warning else not caplog.text


def test_an_unusual_program_has_a_process_too(tmp_path: Path) -> None:
    """It has 1100 open descriptors, a time limit for sockets, and no stderr. A scheduler signals all processes.

    The first descriptors of the process are in use, so that its messages cannot reach a checkpoint.
    """
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as undo, training(tmp_path) as loop:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(2000, limits[1]), limits[1]))
        undo.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        for _ in range(1100):
            undo.enter_context(open(os.devnull))
        undo.callback(socket.setdefaulttimeout, socket.getdefaulttimeout())
        socket.setdefaulttimeout(0.001)
        undo.callback(os.set_inheritable, 2, os.get_inheritable(2))
        os.set_inheritable(2, False)
        loop.save()
        loop.manager.wait()
        loop.check()
        pid = the_process()
        assert all(os.path.lexists(f"/proc/{pid}/fd/{number}") for number in range(3))
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(pid, number)
        loop.save()
        loop.manager.wait()
        assert pid == the_process()


def test_a_process_that_lacks_memory_fails_no_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It cannot map the snapshot. The thread writes the checkpoint, and all later ones, with one warning."""
    with training(tmp_path) as loop:
        loop.save()
        loop.manager.wait()
        resource.prlimit(the_process(), resource.RLIMIT_AS, (1 << 20, 1 << 20))
        loop.extra = torch.ones(40 << 20, dtype=torch.uint8)  # Needs other memory.
        for _ in range(2):
            loop.save()
            loop.manager.wait()
            loop.check()
        assert 1 == len(caplog.records)
        assert "cannot write (OSError: [Errno 12] Cannot allocate memory)" in caplog.text
        assert process_of(os.getpid()) is None


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_leaves_the_snapshot_of_its_parent_alone() -> None:
    """The memory is shared with the child too, so it takes other memory for its own snapshots."""
    snapshots = Snapshots()
    snapshot = snapshots.take(LARGE)
    child = os.fork()
    if child == 0:
        snapshot.release()
        theirs = snapshots.take({name: torch.zeros_like(tensor) for name, tensor in LARGE.items()})
        os._exit(0 if not theirs.wait()["w"].any() else 1)
    assert 0 == os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert torch.equal(LARGE["w"], snapshot.wait()["w"])


def test_the_memory_of_a_snapshot_is_used_again() -> None:
    """Also by a state with other tensors, if it needs about as much."""
    snapshots = Snapshots()
    addresses = []
    for size in (17 << 20, 17 << 20, 16 << 20):
        snapshot = snapshots.take({"w": torch.ones(size), "b": torch.ones(3)})
        state = snapshot.wait()
        addresses.append(state["w"].data_ptr())
        assert state["w"].sum() == size
        snapshot.release()
        del state
    assert addresses[0] == addresses[1] == addresses[2]
    assert 0 == addresses[0] % os.sysconf("SC_PAGESIZE")


def test_a_state_that_grows_a_little_does_not_need_new_memory_each_time() -> None:
    """To allocate all of it takes ten times as long as the copy, and the loop waits for that."""
    snapshots, memories = Snapshots(), set(shared_memory.arenas())
    others = len(memories)
    for size in range(4):
        snapshots.take({"w": LARGE["w"], "grows": torch.ones((1 << 10) + size)}).release()
        memories.update(shared_memory.arenas())
    assert 2 == len(memories) - others


@settings(deadline=None, max_examples=12)
@given(sizes=st.lists(st.integers(0, 40_000) | st.sampled_from([4096, 8192, 5 << 20]), max_size=6), data=st.data())
def test_a_direct_file_has_the_bytes_that_were_written(sizes: list[int], data: st.DataObject) -> None:
    """Whatever the pieces are, and wherever they begin in memory."""
    pieces = [memoryview(random.randbytes(size + 1))[data.draw(st.integers(0, 1)) :] for size in sizes]
    whole = b"".join(pieces)
    with tempfile.NamedTemporaryFile(dir=".") as file:
        stream = writer_program.DirectFile(file.fileno(), "sha256", lambda written: None)
        for piece in pieces:
            stream.write(piece)
        assert len(whole) == stream.finish()
        assert whole == Path(file.name).read_bytes()
        assert hashlib.sha256(whole).hexdigest() == stream.hexdigest


def test_an_alignment_of_torch_that_does_not_suit_blocks_is_kept() -> None:
    """A common multiple of both would need more padding than a zip file can have."""
    written = io.BytesIO()
    archive = Archive(written, alignment=3000, large_alignment=shared_memory.BLOCK)
    archive.write_record("x", b"x" * LARGE_RECORD, LARGE_RECORD)
    archive.close()
    assert 0 == written.getvalue().index(b"xx") % 3000


def test_its_file_is_that_of_the_thread_but_for_the_places_of_large_tensors(tmp_path: Path) -> None:
    """They begin at pages of the file. All names, bytes and flags are the same."""
    with training(tmp_path) as loop:
        loop.save()
        loop.manager.wait()
        written = io.BytesIO()
        open_format("torch").write(loop.state(), written)
        ours, theirs = (zipfile.ZipFile(file) for file in (tmp_path / loop.manager.records[-1].name, written))
        for one, other in zip(ours.infolist(), theirs.infolist(), strict=True):
            for what in ("filename", "CRC", "file_size", "flag_bits", "compress_type"):
                assert getattr(one, what) == getattr(other, what)


def test_what_a_process_writes_after_it_was_given_up_does_not_reach_the_checkpoint(tmp_path: Path) -> None:
    """It may be in the middle of a write that nothing can end. Its file has no name any more."""
    upload = LocalStorage(tmp_path, new_owner()).upload("x.ckpt")
    stream = DigestWriter(upload)
    assert stream.descriptor is not None
    with os.fdopen(os.dup(stream.descriptor), "wb") as other:
        stream.start_over()
        stream.write(b"the thread's")
        other.write(b"the process's, which is longer")
    upload.finish()
    upload.publish(replace=False)
    assert b"the thread's" == (tmp_path / "x.ckpt").read_bytes()
    assert ["x.ckpt"] == [path.name for path in tmp_path.iterdir() if path.is_file()]
