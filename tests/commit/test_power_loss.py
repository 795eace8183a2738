"""The power goes: on real filesystems, at every storage step and after every write to the disk."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib.util
import os
import random
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import attrs
import pytest
from support import logdisk, mounts
from support.fault_me import FOREIGN, Run, check_survivor, policy_of
from support.sampling import DAYS, FIRST, instants

from checkpointer.storage import LocalStorage
from checkpointer.storage.owner import new_owner
from checkpointer.testing import Crash, CrashingStorage, die

pytestmark = pytest.mark.slow

Last = Literal["link", "copy"]
DISKS: dict[str, mounts.Mount] = {"ext4": partial(mounts.ext4, size=32 * mounts.MIB), "xfs": mounts.xfs}
SHUTDOWN = 0x8004587D
NO_LOG_FLUSH = 2


def cut_power(disk: Path) -> None:
    """Let the filesystem forget what it has not written to the disk, and write no more."""
    descriptor = os.open(disk, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
    finally:
        os.close(descriptor)


def reboot(disk: Path) -> None:
    """Mount again, whereby the journal is replayed."""
    device = mounts.sh("findmnt", "-n", "-o", "SOURCE", disk)
    image = mounts.sh("losetup", "-n", "-O", "BACK-FILE", device)
    mounts.unmount(disk)
    mounts.wait_detached(image)
    mounts.sh("mount", "-o", "loop", image, disk)


def prepare(folder: Path) -> None:
    """Make a folder with a foreign file, durably."""
    folder.mkdir()
    (folder / FOREIGN).write_bytes(b"mine")
    mounts.sh("sync", "-f", folder)


def train_until_power_loss(disk: Path, folder: Path, last: Last, at: int) -> tuple[list[int], bool]:
    """Save until the power goes at the n-th storage operation; return the acknowledged steps, and whether it went."""
    owner = new_owner()
    storage = CrashingStorage(LocalStorage(folder, owner), at=at, when="after")
    saved: list[int] = []
    run = None
    try:
        run = Run(storage, policy_of(last))
        for step in range(1, 5):  # Two that are kept, one that retires another, one that only last wants.
            saved += [step] if run.observe(step) else []
        run.manager.close()
    except Crash:
        cut_power(disk)
    die(owner)
    if run is not None:
        die(run.manager._owner)
    return saved, storage.is_dead


@pytest.mark.parametrize("last", ["link", "copy"])
@pytest.mark.parametrize("kind", DISKS)
def test_power_loss_at_every_second_storage_step_loses_nothing_acknowledged(
    tmp_path: Path, kind: str, last: Last
) -> None:
    """Unmounted, mounted again: all that was acknowledged restores with its digest, and the next save works."""
    with DISKS[kind](tmp_path) as disk:
        for at in instants(1000, 2):
            folder = disk / str(at)
            prepare(folder)
            saved, died = train_until_power_loss(disk, folder, last, at)
            if not died:
                break
            reboot(disk)
            check_survivor(folder, saved, policy_of(last), f"{kind}: power loss after operation {at}")
            shutil.rmtree(folder)
        assert at > 50


@pytest.mark.parametrize("kind", DISKS)
def test_power_loss_right_after_a_save_is_acknowledged_keeps_it(tmp_path: Path, kind: str) -> None:
    """Between the save and the power loss nothing is done, not even closing the manager; five times in a row."""
    with DISKS[kind](tmp_path) as disk:
        folder = disk / "run"
        prepare(folder)
        saved: list[int] = []
        for _ in range(5):
            run = Run(folder, policy_of())
            run.manager.restore()
            saved.append(max(saved, default=0) + 1)
            assert run.observe(saved[-1])
            cut_power(disk)
            die(run.manager._owner)
            reboot(disk)
            check_survivor(folder, saved, policy_of(), f"{kind}: power loss after step {saved[-1]}")
            saved.append(saved[-1] + 1)


@pytest.mark.parametrize("kind", DISKS)
def test_power_loss_takes_what_was_not_synced(tmp_path: Path, kind: str) -> None:
    """So that the tests above can fail: without fsync an acknowledged save is lost."""
    with DISKS[kind](tmp_path) as disk:
        folder = disk / "run"
        prepare(folder)
        saved = [step for step, _ in train(folder, "link", fsync=False)]
        assert saved
        cut_power(disk)
        reboot(disk)
        with pytest.raises(AssertionError):
            check_survivor(folder, saved, policy_of())


# Every prefix of what was written to the disk


def train(folder: Path, last: Last, *, fsync: bool, log: Path | None = None) -> list[tuple[int, int]]:
    """Save in another process; return each acknowledged step and how long the disk's log was by then.

    Without ``fsync`` strace reports success to the process, and does nothing.
    """
    command = [sys.executable, "-m", "support.fault_me", str(folder), last, *([str(log)] if log else [])]
    if not fsync:
        mounts.need("strace")
        lie = ["-e", "trace=fsync", "-e", "inject=fsync:retval=0"]
        command = ["strace", "-f", "-qq", "-o", os.devnull, *lie, *command]
    done = subprocess.run(command, input="go\n", capture_output=True, text=True, timeout=120)
    assert 0 == done.returncode, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    return [(int(line[1]), int(line[2])) for line in lines if line[0] == "saved"]


@attrs.frozen
class Recording:
    """The writes that the disk got while a training saved on it."""

    base: Path
    """The disk before, with an empty filesystem."""
    log: Path
    ready: int
    """How long the log was when the training could begin."""
    saved: list[tuple[int, int]]
    """Each acknowledged step, and how long the log was then."""


SIZES = {"ext4": 32 * mounts.MIB, "xfs": 300 * mounts.MIB}


@contextlib.contextmanager
def logging_disk(base: Path, disk: Path) -> Iterator[tuple[Path, Path]]:
    """Mount a disk image through a loop device on a file that logs what is written; yield mount point and log."""
    if importlib.util.find_spec("mfusepy") is None:
        mounts.give_up(["mfusepy"])
    mounts.need("mount", "losetup", "fusermount3", fuse=True, loop=True)
    front, log = base / "front", base / "log"
    front.mkdir()
    server = subprocess.Popen([sys.executable, "-m", "support.logdisk", str(front), str(disk), str(log)])
    try:
        deadline = time.monotonic() + 30
        while not (front / "disk.img").exists():
            assert server.poll() is None
            assert time.monotonic() < deadline, "the logging disk does not appear"
            time.sleep(0.02)
        target = base / "disk"
        with mounts.mounted(target, "mount", "-o", "loop", front / "disk.img", target):
            yield target, log
    finally:
        with contextlib.suppress(AssertionError):
            mounts.unmount(front)
        server.terminate()
        server.wait(timeout=30)


@contextlib.contextmanager
def syncing(folder: Path) -> Iterator[None]:
    """Sync the filesystem of a folder again and again, so that every state of it reaches the disk.

    On a slow machine the kernel does so between any two steps of a training.
    """
    libc, ended, descriptor = ctypes.CDLL(None), threading.Event(), os.open(folder, os.O_RDONLY)

    def work() -> None:
        while not ended.wait(random.uniform(0, 0.004)):
            libc.syncfs(descriptor)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        os.close(descriptor)


def record(base: Path, kind: str, last: Last, *, fsync: bool, syncs: bool = False) -> Recording:
    """Train on a disk that logs its writes; with ``syncs`` each state of it reaches the disk."""
    mounts.need(f"mkfs.{kind}")
    disk = mounts.image(base / "disk.img", kind, SIZES[kind])
    fresh = base / "base.img"
    mounts.sh("cp", "--sparse=always", disk, fresh)
    with logging_disk(base, disk) as (target, log):
        prepare(target / "run")
        ready = log.stat().st_size
        with syncing(target) if syncs else contextlib.nullcontext():
            saved = train(target / "run", last, fsync=fsync, log=log)
    return Recording(base=fresh, log=log, ready=ready, saved=saved)


def check_prefixes(base: Path, recording: Recording, last: Last, stride: int = DAYS) -> tuple[int, list[str]]:
    """Build every ``stride``-th prefix of the writes, mount it, and look.

    Returns how many writes there were after the disk was ready, and what was lost.
    """
    disk, crashed, target = base / "rebuilt.img", base / "crashed.img", base / "crashed"
    mounts.sh("cp", "--sparse=always", recording.base, disk)
    lost: list[str] = []
    count = 0
    with open(disk, "r+b", buffering=0) as stream:
        for number, (end, offset, data) in enumerate(logdisk.events(recording.log)):
            os.pwrite(stream.fileno(), data, offset)
            saved = [step for step, position in recording.saved if position <= end]
            count += 1
            if (number - FIRST) % stride or end < recording.ready:
                continue
            mounts.sh("cp", "--sparse=always", disk, crashed)
            with mounts.mounted(target, "mount", "-o", "loop", crashed, target):
                try:
                    check_survivor(target / "run", saved, policy_of(last))
                except Exception as error:
                    lost.append(f"after write {number}, saved {saved}: {error!r}")
    return count, lost


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder for disk images that are copied again and again."""
    with mounts.tmpfs(tmp_path, 1024 * mounts.MIB) as path:
        yield path


@pytest.mark.parametrize(("last", "syncs"), [("link", False), ("copy", True)])
def test_after_any_write_to_an_ext4_disk_all_acknowledged_restores(memory: Path, last: Last, syncs: bool) -> None:
    """Every prefix of the block writes of six saves, mounted and restored from; a third of them each day in CI."""
    recording = record(memory, "ext4", last, fsync=True, syncs=syncs)
    assert [1, 2, 3, 4, 5, 6] == [step for step, _ in recording.saved]
    count, lost = check_prefixes(memory, recording, last)
    assert not lost, "\n".join(lost)
    assert count > 100


def test_after_any_write_to_an_xfs_disk_all_acknowledged_restores(memory: Path) -> None:
    """Every prefix of the block writes of six saves, mounted and restored from."""
    recording = record(memory, "xfs", "link", fsync=True)
    count, lost = check_prefixes(memory, recording, "link")
    assert not lost, "\n".join(lost)
    assert count > 50


def test_without_fsync_the_logging_disk_shows_the_loss(memory: Path) -> None:
    """So that the tests above can fail: the same training, whose fsync does nothing, loses what it acknowledged."""
    recording = record(memory, "ext4", "link", fsync=False)
    _, lost = check_prefixes(memory, recording, "link", stride=4)
    assert lost
