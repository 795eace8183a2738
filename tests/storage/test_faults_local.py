"""A local disk is full, broken or wrong at every byte and every system call; acknowledged checkpoints stay."""

from __future__ import annotations

import errno
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import BinaryIO, Literal

import attrs
import pytest
from support import fault_me, mounts
from support.fault_me import FOREIGN, WARM, Run, check_survivor, policy_of
from support.forking import Program
from support.plain_format import PlainFormat
from support.sampling import instants

from checkpointer import (
    CheckpointerWarning,
    CheckpointManager,
    EverySeconds,
    EverySteps,
    KeepBest,
    KeepEvery,
    KeepLast,
    Naming,
    Policy,
)
from checkpointer.errors import (
    NotEnoughSpaceError,
    NoValidCheckpointError,
    RestoreError,
    SaveError,
    StorageError,
)
from checkpointer.ports import Stat, Upload
from checkpointer.restore.load import verify
from checkpointer.storage import LocalStorage
from checkpointer.storage.owner import new_owner
from checkpointer.testing import MemoryStorage
from checkpointer.tools.catalog import look_at

pytestmark = pytest.mark.slow

Last = Literal["link", "copy"]


# The n-th system call


@attrs.frozen
class Outcome:
    """The reports of a training whose system calls were changed."""

    saved: list[int]
    failed: dict[int, str]
    warned: list[str]
    closed: bool
    returncode: int
    hits: int
    """Number of changed system calls."""


def run_with_fault(directory: Path, last: Last, calls: str, fault: str) -> Outcome:
    """Train, and from the third save on let strace inject ``fault`` into ``calls``."""
    mounts.need("strace")
    directory.mkdir()
    (directory / FOREIGN).write_bytes(b"mine")
    log = directory.parent / f"{directory.name}.strace"
    child = Program(fault_me.main, str(directory), last)
    tracer = None
    try:
        lines = [child.stdout.readline() for _ in range(WARM + 1)]
        assert "ready\n" == lines[-1], child.stderr.read()
        tracer = subprocess.Popen(
            ["strace", "-f", "-o", log, "-e", f"trace={calls}", "-e", f"inject={calls}:{fault}", "-p", str(child.pid)],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert tracer.stderr is not None
        attached = tracer.stderr.readline()
        assert "attached" in attached, attached
        child.stdin.write("go\n")
        child.stdin.flush()
        lines += child.stdout.read().splitlines(keepends=True)
        child.wait(timeout=60)
        tracer.wait(timeout=60)
        tracer.stderr.close()
    finally:
        child.close()
        if tracer is not None and tracer.poll() is None:
            tracer.kill()
            tracer.wait()
    reports = [line.split(maxsplit=2) for line in lines if line.endswith("\n")]
    return Outcome(
        saved=[int(report[1]) for report in reports if report[0] == "saved"],
        failed={int(report[1]): report[2] for report in reports if report[0] == "failed"},
        warned=[" ".join(report[1:]) for report in reports if report[0] == "warned"],
        closed=["closed"] in reports,
        returncode=child.returncode,
        hits=log.read_text().count("(INJECTED)") if log.exists() else 0,
    )


def every_call(
    base: Path, last: Last, calls: str, fault: str, numbers: range | None = None
) -> Iterator[tuple[Path, Outcome, str]]:
    """Run with the fault at the first call, at the second, and so on until the training makes fewer calls.

    Of the two hundred calls that only read, every tenth is tried.
    """
    for n in numbers or instants(1000, 10 if calls in (CALLS["stat"], CALLS["open"]) else 1):
        directory = base / f"{n}"
        outcome = run_with_fault(directory, last, calls, f"{fault}:when={n}")
        if not outcome.hits and outcome.closed:
            assert n > 1, f"{calls} is never called"
            return
        yield directory, outcome, f"{fault} at call {n} of {calls}, last={last}: {outcome}"


CALLS = {
    "fsync": "fsync",
    "write": "write",
    "open": "openat",
    "rename": "rename,renameat,renameat2",
    "link": "link,linkat",
    "symlink": "symlink,symlinkat",
    "unlink": "unlink,unlinkat",
    "stat": "newfstatat,lstat,stat,fstat",
}


@pytest.mark.parametrize("last", ["link", "copy"])
@pytest.mark.parametrize("call", [call for call in CALLS if call != "unlink"])
def test_any_system_call_may_fail_and_nothing_acknowledged_is_lost(tmp_path: Path, call: str, last: Last) -> None:
    """EIO at the n-th call, for every n: the save succeeds, or fails with a clear error; the next save succeeds."""
    for directory, outcome, clue in every_call(tmp_path, last, CALLS[call], "error=EIO"):
        assert 0 == outcome.returncode, clue
        assert outcome.closed, clue
        assert len(outcome.failed) <= 1, clue
        assert all("Input/output error" in error for error in outcome.failed.values()), clue
        assert {1, 2, 3, 4, 5, 6} == {*outcome.saved, *outcome.failed}, clue
        check_survivor(directory, outcome.saved, policy_of(last), clue)


@pytest.mark.parametrize("error", ["EACCES", "EPERM"])
def test_refused_delete_is_a_warning_and_is_tried_again(tmp_path: Path, error: str) -> None:
    """No save fails because of it, and retired checkpoints are deleted later."""
    for directory, outcome, clue in every_call(tmp_path, "link", CALLS["unlink"], f"error={error}"):
        assert {} == outcome.failed, clue
        assert [1, 2, 3, 4, 5, 6] == outcome.saved, clue
        check_survivor(directory, outcome.saved, policy_of("link"), clue)


@pytest.mark.parametrize("last", ["link", "copy"])
@pytest.mark.parametrize("call", ["fsync", "rename", "link", "unlink", "symlink"])
def test_killed_instead_of_any_system_call_nothing_acknowledged_is_lost(tmp_path: Path, call: str, last: Last) -> None:
    """SIGKILL in place of the n-th call, for every n."""
    for directory, outcome, clue in every_call(tmp_path, last, CALLS[call], "error=EIO:signal=KILL"):
        assert -signal.SIGKILL == outcome.returncode, clue
        check_survivor(directory, outcome.saved, policy_of(last), clue)


@pytest.mark.parametrize("call", ["write", "open", "rename", "link"])
def test_full_disk_at_any_system_call_is_a_clear_error(tmp_path: Path, call: str) -> None:
    """ENOSPC at the n-th call, for every n."""
    for directory, outcome, clue in every_call(tmp_path, "link", CALLS[call], "error=ENOSPC"):
        assert outcome.closed, clue
        assert all("No space left" in error for error in outcome.failed.values()), clue
        check_survivor(directory, outcome.saved, policy_of("link"), clue)


@pytest.mark.filterwarnings("ignore::checkpointer.CheckpointerWarning")
def test_write_that_lies_about_its_length_is_noticed(tmp_path: Path) -> None:
    """If a disk has written less than it reports, the size shows it when the directory is opened."""
    noticed = set()
    for directory, outcome, clue in every_call(tmp_path, "link", CALLS["write"], "retval=10", range(1, 1000)):
        assert [1, 2, 3, 4, 5, 6] == sorted([*outcome.saved, *outcome.failed]), clue
        run = Run(directory, policy_of("link"))
        if run.manager.session.manifest.aside:
            noticed.add("payload")
        for record in run.manager.records:
            restored = run.manager.restore(record.name)
            assert restored is not None
            assert record.step == restored.state["step"], clue
        if look_at(LocalStorage(directory, "")).damaged:
            noticed.add("record")
            with pytest.warns(CheckpointerWarning, match=r"restored .* because newer or better ones could not be used"):
                run.manager.restore()
        run.manager.close()
    assert {"payload", "record"} == noticed


# A disk that is full


def steps_saved(run: Run, steps: range) -> tuple[list[int], list[SaveError]]:
    """Observe these steps; return the acknowledged steps, and the errors of the others."""
    saved, errors = [], []
    for step in steps:
        try:
            saved += [step] if run.observe(step) else []
        except SaveError as error:
            errors.append(error)
    return saved, errors


def names_full_disk(error: BaseException | None) -> bool:
    """Return whether the error or one of its causes is about a full disk."""
    while error is not None:
        if isinstance(error, NotEnoughSpaceError) or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
            return True
        error = error.__cause__ or error.__context__
    return False


FILESYSTEMS: dict[str, mounts.Mount] = {
    "tmpfs": partial(mounts.tmpfs, size=4 * mounts.MIB),
    "ext4": partial(mounts.ext4, size=8 * mounts.MIB),
}


@pytest.mark.filterwarnings("ignore::checkpointer.CheckpointerWarning")
@pytest.mark.parametrize("last", ["link", "copy"])
@pytest.mark.parametrize("kind", FILESYSTEMS)
def test_disk_that_fills_up_at_any_byte_loses_nothing(tmp_path: Path, kind: str, last: Last) -> None:
    """For every number of free pages that a save may need: staging, records, alias, index."""
    failures = 0
    with FILESYSTEMS[kind](tmp_path) as disk:
        for left in instants(40 * 4096, 4096 if kind == "tmpfs" else 1024):
            clue = f"{left} bytes left on {kind}"
            folder = disk / str(left)
            folder.mkdir()
            (folder / FOREIGN).write_bytes(b"mine")
            # The state grows, because the check before a save expects the size of the last one.
            run = Run(folder, policy_of(last), filler=10)
            saved, _ = steps_saved(run, range(1, 3))
            run.filler = "x" * 20_000
            with mounts.filled(disk, left):
                more, errors = steps_saved(run, range(3, 6))
                assert all(names_full_disk(error) for error in errors), (clue, errors)
                staged = [path for path in (folder / ".checkpointer/staging").rglob("*") if path.is_file()]
                assert [] == staged, f"{clue}: the disk stays full of what did not fit"
                assert whole_steps(folder, saved + more) >= {*(saved + more)[-1:]}, clue
                failures += len(errors)
            assert run.observe(6), f"{clue}: there is room again"
            run.manager.close()
            check_survivor(folder, [*saved, *more, 6], policy_of(last), clue)
            shutil.rmtree(folder)
    assert failures, "the disk was never full"


def whole_steps(folder: Path, steps: list[int]) -> set[int]:
    """Return which of these steps a reader, which does not write, can restore."""
    reader = CheckpointManager(folder, format=PlainFormat())
    whole = set()
    for step in steps:
        try:
            restored = reader.restore(step)
        except RestoreError:
            continue
        assert restored is not None
        assert step == restored.state["step"]
        whole.add(step)
    reader.close()
    return whole


@pytest.mark.filterwarnings("ignore::checkpointer.CheckpointerWarning")
@pytest.mark.parametrize("left", [0, 4096, 8192, 16384])
def test_manager_on_a_full_disk_says_so_and_can_still_restore(tmp_path: Path, left: int) -> None:
    """The error names the folder and the reason. A reader needs no space. Once there is space, saves succeed."""
    with mounts.tmpfs(tmp_path, 4 * mounts.MIB) as disk:
        folder = disk / "run"
        folder.mkdir()
        (folder / FOREIGN).write_bytes(b"mine")
        run = Run(folder, policy_of())
        saved, _ = steps_saved(run, range(1, 4))
        run.manager.close()
        with mounts.filled(disk, left):
            assert 3 in whole_steps(folder, saved)
            if left == 0:
                with pytest.raises(StorageError, match=f"cannot write to {folder}: No space left.*; free some space"):
                    Run(folder, policy_of())
            else:
                again = Run(folder, policy_of())
                _, errors = steps_saved(again, range(4, 6))
                assert all(names_full_disk(error) for error in errors)
                again.manager.close()
        check_survivor(folder, saved, policy_of())


def test_free_space_is_checked_before_writing(tmp_path: Path) -> None:
    """If a checkpoint of the last one's size does not fit, nothing is staged."""
    with mounts.tmpfs(tmp_path, 4 * mounts.MIB) as disk:
        run = Run(disk, policy_of(), filler=200_000)
        run.observe(1)
        with mounts.filled(disk, 100_000):
            before = sorted(disk.rglob("*"))
            with pytest.raises(NotEnoughSpaceError, match=r"nothing was written\. Free some space"):
                run.observe(2)
            assert before == sorted(disk.rglob("*"))
        assert run.observe(3)
        run.manager.close()


def test_so_many_failures_in_a_row_are_tolerated(tmp_path: Path) -> None:
    """Two failures are warnings, the third is raised. A success resets the count."""
    with mounts.tmpfs(tmp_path, 4 * mounts.MIB) as disk:
        run = Run(disk, policy_of(), filler=200_000, tolerate_failures=2)
        assert run.observe(1)
        for first in (2, 5):
            with mounts.filled(disk, 100_000):
                for step in (first, first + 1):
                    with pytest.warns(CheckpointerWarning, match=rf"failure {step - first + 1} of 2 tolerated"):
                        assert not run.observe(step)
            if first == 2:
                assert run.observe(first + 2)
        with mounts.filled(disk, 100_000), pytest.raises(NotEnoughSpaceError):
            run.observe(7)
        assert run.observe(8)
        run.manager.close()


# Other writers


def test_publishing_into_a_folder_that_others_prune_never_fails(tmp_path: Path) -> None:
    """Two writers put files into one folder and delete them, so the folder appears and disappears."""
    errors: list[Exception] = []

    def work(storage: LocalStorage, name: str) -> None:
        for _ in range(300):
            try:
                upload = storage.upload(f"x/y/{name}")
                upload.finish()
                upload.publish(replace=False)
                storage.write(f"x/z/{name}", b"1")
                storage.symlink(f"x/y/{name}", f"x/w/{name}")
                for folder in ("y", "z", "w"):
                    storage.delete(f"x/{folder}/{name}")
            except Exception as error:
                errors.append(error)
                storage.delete(f"x/y/{name}")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [Thread(target=work, args=(LocalStorage(tmp_path, new_owner()), name)) for name in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert [] == errors


# A listing that lags


class Lagging:
    """A storage whose listings lag behind by a number of changes."""

    def __init__(self, inner: MemoryStorage, lag: int) -> None:
        self.inner = inner
        self.lag = lag
        self._seen = [dict(inner.list())]

    def __str__(self) -> str:
        return "lagging"

    def list(self, prefix: str = "") -> dict[str, Stat]:
        then = self._seen[max(0, len(self._seen) - 1 - self.lag)]
        return {p: stat for p, stat in then.items() if not prefix or f"{p}/".startswith(f"{prefix}/")}

    def open(self, path: str) -> BinaryIO:
        return self.inner.open(path)

    def write(self, path: str, data: bytes) -> None:
        self.inner.write(path, data)
        self.changed()

    def delete(self, path: str) -> None:
        self.inner.delete(path)
        self.changed()

    def upload(self, path: str) -> Upload:
        return LaggingUpload(self, self.inner.upload(path))

    def changed(self) -> None:
        self._seen.append(dict(self.inner.list()))


class LaggingUpload:
    def __init__(self, storage: Lagging, inner: Upload) -> None:
        self._storage = storage
        self._inner = inner
        self.write = inner.write
        self.finish = inner.finish
        self.abort = inner.abort

    def publish(self, *, replace: bool) -> None:
        self._inner.publish(replace=replace)
        self._storage.changed()


LAGGED = {
    "best and last": Policy(EverySteps(1), [KeepBest(2, "loss", mode="min"), KeepLast(1)]),
    "aliases": policy_of("link"),
    "slot": policy_of("copy"),
    "one name": Policy(EverySteps(1), [KeepLast(1)], name=Naming("model", version_counter=False)),
}


@pytest.mark.parametrize("lag", [1, 2, 3, 5, 8, 13, 50])
@pytest.mark.parametrize("name", LAGGED)
def test_listing_that_lags_is_not_believed_over_what_can_be_opened(name: str, lag: int) -> None:
    """The newest checkpoint restores, retired ones are deleted, and another process uses no name twice."""
    storage = Lagging(MemoryStorage(), lag)
    run = Run(storage, LAGGED[name], filler=10)
    for step in range(1, 7):
        assert run.observe(step)
        restored = run.manager.restore()
        assert restored is not None
        assert (step, step) == (restored.step, restored.state["step"])
    run.manager.close()
    check_caught_up(storage.inner, LAGGED[name], {6})

    again = Run(storage, LAGGED[name], filler=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointerWarning)
        try:
            again.manager.restore()
        except NoValidCheckpointError:
            return  # It sees only deleted checkpoints: that is an error, not a silent start from nothing.
        visible = [record.step for record in again.manager.records]
        saved, errors = steps_saved(again, range(max(visible, default=0) + 1, 9))
    again.manager.close()
    if visible:
        assert 8 in saved, "a taken name is not used twice, and does not stop the save"
    # If it sees nothing, it is a new run, which raises if it would replace a file.
    assert not errors or not visible, errors
    check_caught_up(storage.inner, LAGGED[name], {8} if visible else {6})


def check_caught_up(storage: MemoryStorage, policy: Policy, steps: set[int]) -> None:
    """Check with a current listing that each record has its payload, and that these steps are among them."""
    reader = CheckpointManager(storage, policy, format=PlainFormat())
    for record in reader.session.manifest.records:
        verify(storage, record)
    assert steps <= {record.step for record in reader.session.manifest.records}
    payloads = {path for path in storage.list() if not path.startswith(".checkpointer/")} - {"last.ckpt", "best.ckpt"}
    assert payloads <= {record.name for record in reader.session.manifest.records}
    reader.close()


# A clock that jumps

DAY = 86_400.0


class SetClock:
    """A clock that a test sets."""

    def __init__(self, now: float) -> None:
        self.now = now

    def time(self) -> float:
        return self.now


# Within a process a clock must not go back. The system clock does not, because it counts monotonically.
@pytest.mark.parametrize(("jump", "restart"), [(-DAY, True), (DAY, True), (-1.0, True), (-1.6e9, True), (DAY, False)])
def test_clock_that_jumps_neither_stops_saving_nor_loses_anything(tmp_path: Path, jump: float, restart: bool) -> None:
    """Due and kept by seconds: after the jump a save follows within one interval, and kept checkpoints stay."""
    policy = Policy(EverySeconds(60), [KeepEvery(seconds=120), KeepLast(1)])
    clock = SetClock(1.7e9)
    run = Run(tmp_path, policy, clock=clock)
    saved = []
    for step in range(1, 41):
        clock.now += 20 + (jump if step == 20 else 0)
        if step == 20 and restart:
            run.manager.close()
            run = Run(tmp_path, policy, clock=clock)
            run.manager.restore()
        saved += [step] if run.observe(step) else []
    gaps = [later - earlier for earlier, later in pairwise([0, *saved, 40])]
    assert max(gaps) <= 4, saved
    kept = [record.step for record in run.manager.records]
    assert saved[-1] == kept[-1]
    assert max(later - earlier for earlier, later in pairwise([saved[0], *kept])) <= 10, kept
    for step in kept:
        restored = run.manager.restore(step)
        assert restored is not None
        assert step == restored.state["step"]
    run.manager.close()
