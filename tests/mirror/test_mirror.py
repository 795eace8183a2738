"""Two tiers: what is copied to a mirror, what is fetched from it, and that it never holds the training up."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from support.plain_format import PlainFormat

from checkpointer import CheckpointerWarning, CheckpointManager, EverySteps, KeepAll, KeepBest, KeepLast, Mirror, Policy
from checkpointer.errors import (
    CheckpointerError,
    FencedError,
    RestoreError,
    StorageError,
)
from checkpointer.mirror.plan import retry_after
from checkpointer.ports import Stat, Storage, Upload
from checkpointer.storage import LocalStorage
from checkpointer.testing import MemoryStorage

DEADLINE_S = 30.0
LAST = Policy(EverySteps(1), [KeepLast(1)])
ALL = Policy(EverySteps(1), [KeepAll(), KeepBest(1, "loss", mode="min")])


class Remote:
    """A storage elsewhere: it can be down, or not answer, and knows which threads have asked it."""

    def __init__(self, inner: Storage | None = None) -> None:
        self.inner = inner or MemoryStorage()
        self.error: Exception | None = None
        self.answers = threading.Event()
        self.answers.set()
        self.asked = threading.Event()
        self.threads: set[int] = set()
        self.uploaded: list[str] = []

    def __str__(self) -> str:
        return "remote"

    def _ask(self) -> None:
        self.threads.add(threading.get_ident())
        self.asked.set()
        self.answers.wait()
        if self.error is not None:
            raise self.error

    def list(self, prefix: str = "") -> Mapping[str, Stat]:
        self._ask()
        return self.inner.list(prefix)

    def open(self, path: str) -> BinaryIO:
        self._ask()
        return self.inner.open(path)

    def write(self, path: str, data: bytes) -> None:
        self._ask()
        self.inner.write(path, data)

    def delete(self, path: str) -> None:
        self._ask()
        self.inner.delete(path)

    def upload(self, path: str) -> Upload:
        self._ask()
        self.uploaded.append(path)
        return self.inner.upload(path)


class Run:
    """A little training whose state is its step."""

    def __init__(self, directory: Any, policy: Policy = LAST, **kwargs: Any) -> None:
        self.step = 0
        kwargs.setdefault("state", lambda: {"step": self.step})
        self.manager = CheckpointManager(directory, policy, format=PlainFormat(), **kwargs)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: Any) -> None:
        self.manager.__exit__(*error)

    def restore(self, which: str | int | None = None, **kwargs: Any) -> int:
        """Restore, check that the state is of that step, and return it; 0 if there was nothing."""
        restored = self.manager.restore(which, **kwargs)
        if restored is None:
            return 0
        assert {"step": restored.step} == restored.state
        self.step = restored.step
        return restored.step

    def save(self, *losses: float) -> None:
        for loss in losses:
            self.step += 1
            assert self.manager.observe({"loss": loss}, step=self.step, epoch=0, epoch_end=False)

    def mirrored(self) -> None:
        """Wait until the mirror has what its rules want."""
        eventually(lambda: self.behind == ())

    @property
    def behind(self) -> tuple[str, ...]:
        assert self.manager.session.mirror_status is not None
        return self.manager.session.mirror_status.behind


def eventually(is_so: Callable[[], bool]) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < deadline, "it never came to be so"
        time.sleep(0.002)


def steps(storage: Any, policy: Policy = ALL) -> list[int]:
    """Steps of the run that a directory opened by itself holds, each verified."""
    with CheckpointManager(storage, policy, format=PlainFormat()) as manager:
        for record in manager.session.manifest.own or manager.records:
            restored = CheckpointManager(storage, policy, format=PlainFormat()).restore(record.name)
            assert restored is not None
            assert {"step": record.step} == restored.state
        return [record.step for record in manager.records]


def payloads(storage: Storage) -> list[str]:
    """Every file that is not ours to keep books with."""
    return sorted(path for path in storage.list() if not path.startswith(".checkpointer"))


# Copying


def test_mirror_is_an_ordinary_directory_with_the_same_records(tmp_path: Path) -> None:
    """Name, digest, token and all: only the place differs, and a manager opens it as any other."""
    with Run(tmp_path / "here", ALL, mirror=tmp_path / "there") as run:
        run.save(0.9, 0.4, 0.6)
    there = CheckpointManager(tmp_path / "there", ALL, format=PlainFormat())
    assert run.manager.records == there.records
    assert there.best is not None
    assert 2 == there.best.step
    assert 3 == there.restore().step  # type: ignore[union-attr]


@pytest.mark.parametrize("url", ["path", "memory"])
def test_mirror_has_its_own_retention_and_aliases(tmp_path: Path, url: str) -> None:
    """One is here and three are there; both have a last."""
    there = str(tmp_path / "there") if url == "path" else f"memory://{tmp_path.name}"
    policy = Policy(EverySteps(1), [KeepLast(1)], last="link")
    with Run(tmp_path / "here", policy, mirror=Mirror(there, keep=[KeepLast(3)])) as run:
        for _ in range(5):
            run.save(0.5)
            run.mirrored()
        assert [5] == [record.step for record in run.manager.records]
    assert [3, 4, 5] == steps(there, policy)
    storage = CheckpointManager(there, policy, format=PlainFormat())._directory.storage
    with storage.open("last.ckpt") as stream:
        assert {"step": 5} == json.load(stream)
    assert ["epoch=0-step=3.ckpt", "epoch=0-step=4.ckpt", "epoch=0-step=5.ckpt", "last.ckpt"] == payloads(storage)


def test_retiring_there_does_not_depend_on_what_is_retired_here() -> None:
    """Everything is kept here, and one there."""
    there = MemoryStorage()
    with Run(None, ALL, mirror=Mirror(there, keep=[KeepLast(1)])) as run:
        run.save(0.1, 0.2, 0.3)
        assert 3 == len(run.manager.records)
    assert [3] == steps(there)


def test_attached_metrics_reach_the_mirror_without_a_second_upload() -> None:
    """Only the record is written again, and the rules there rank again."""
    there = Remote()
    with Run(None, ALL, mirror=Mirror(there, keep=[KeepBest(1, "val", mode="min"), KeepLast(1)])) as run:
        for step, val in ((1, 0.5), (2, 0.1), (3, 0.3), (4, 0.4)):
            run.save(0.0)
            run.manager.observe({"val": val}, step=step, epoch=0, epoch_end=False)
            run.mirrored()
    records = {r.step: r for r in CheckpointManager(there.inner, ALL, format=PlainFormat()).records}
    assert {2, 4} == set(records)
    assert 0.1 == records[2].metrics["val"]
    assert len(set(there.uploaded)) == len(there.uploaded)


def test_a_process_whose_mirror_another_one_has_taken_over_ends_and_harms_nothing_there(tmp_path: Path) -> None:
    """Each has a disk of its own, and both have one mirror. The first one learns of the second by the mirror."""
    first = Run(tmp_path / "first", ALL, mirror=tmp_path / "there", run="r")
    first.save(0.5)
    first.mirrored()
    with Run(tmp_path / "second", ALL, mirror=tmp_path / "there", run="r", takeover=True) as second:
        assert 1 == second.restore()
        second.save(0.4)
        second.mirrored()
        first.save(0.3)
        eventually(lambda: first.manager.session.mirror_status.error != "")  # type: ignore[union-attr]
        with pytest.raises(FencedError, match=r"has taken over run 'r' in .*there"):
            first.save(0.2)
        second.save(0.1)
    with pytest.warns(CheckpointerWarning, match="has taken over run 'r'"):
        first.manager.close()
    assert [1, 2, 3] == steps(tmp_path / "there")
    assert [0.5, 0.4, 0.1] == [r.metrics["loss"] for r in CheckpointManager(tmp_path / "there", ALL, run="r").records]


def test_pin_reaches_the_mirror() -> None:
    """A pinned checkpoint stays there, too."""
    there = MemoryStorage()
    with Run(None, ALL, mirror=Mirror(there, keep=[KeepLast(1)])) as run:
        run.save(0.1)
        run.manager.pin("epoch=0-step=1.ckpt")
        run.save(0.2, 0.3)
    assert [1, 3] == steps(there)


def test_slot_is_mirrored_under_a_name_of_its_own() -> None:
    """Here each save overwrites last.ckpt; there nothing is overwritten before the next is whole."""
    policy = Policy(EverySteps(1), [KeepBest(1, "loss", mode="min")], last="copy")
    there = MemoryStorage()
    with Run(MemoryStorage(), policy, mirror=there) as run:
        for loss in (0.1, 0.5, 0.6):
            run.save(loss)
            run.mirrored()
        assert "last.ckpt" in [record.name for record in run.manager.records]
    assert ["epoch=0-step=1.ckpt", "epoch=0-step=3.ckpt", "last.ckpt"] == payloads(there)
    with Run(MemoryStorage(), policy, mirror=there) as again:
        assert 3 == again.restore()
        again.save(0.7)
    assert ["epoch=0-step=1.ckpt", "epoch=0-step=4.ckpt", "last.ckpt"] == payloads(there)


def test_a_file_of_others_there_is_left_alone() -> None:
    """The copy takes the next version; the token says that it is the same checkpoint."""
    there = MemoryStorage()
    there.write("epoch=0-step=1.ckpt", b"theirs")
    with Run(None, LAST, mirror=there) as run:
        run.save(0.1)
    assert b"theirs" == there.open("epoch=0-step=1.ckpt").read()
    assert ["epoch=0-step=1-v1.ckpt", "epoch=0-step=1.ckpt"] == payloads(there)
    with Run(None, LAST, mirror=there) as again:
        assert 1 == again.restore()
        again.mirrored()
    assert 2 == len(payloads(there))


def test_one_name_written_again_and_again_is_whole_on_the_mirror() -> None:
    """Versions off: the old copy goes when the new one is there."""
    from checkpointer import Naming

    there = MemoryStorage()
    policy = Policy(EverySteps(1), [KeepLast(1)], name=Naming("model", version_counter=False))
    with Run(MemoryStorage(), policy, mirror=there) as run:
        for _ in range(3):
            run.save(0.1)
            run.mirrored()
    assert [3] == steps(there, policy)
    assert 1 == len(payloads(there))


def test_rescue_is_mirrored_when_an_exception_ends_the_training() -> None:
    """Leaving the block waits for the mirror on an error as well."""
    there = MemoryStorage()

    def train_and_fail() -> None:
        with Run(None, Policy(EverySteps(2), [KeepLast(1)]), mirror=there) as run:
            run.step = 1
            run.manager.observe({}, step=1, epoch=0, epoch_end=False)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train_and_fail()
    assert ["rescue-step=1.ckpt"] == payloads(there)


def test_reader_copies_nothing() -> None:
    """A manager without state only looks."""
    here, there = MemoryStorage(), MemoryStorage()
    with Run(here, ALL) as run:
        run.save(0.1)
    with Run(here, ALL, state=None, mirror=there) as reader:
        assert 1 == reader.restore()
    assert [] == payloads(there)


# A mirror that is down


def test_training_never_touches_the_mirrors_storage() -> None:
    """Constructing, observing, pinning and closing leave it to the mirror's own thread."""
    there = Remote()
    with Run(None, ALL, mirror=there) as run:
        run.save(0.3, 0.2, 0.1)
        run.manager.pin("epoch=0-step=1.ckpt")
        run.manager.observe({"val": 1.0}, step=2, epoch=0, epoch_end=False)
    assert there.threads
    assert threading.get_ident() not in there.threads


def test_mirror_that_never_answers_does_not_hold_up_training_or_the_end() -> None:
    """Saves go on; close gives up after its timeout and names what is missing."""
    there = Remote()
    there.answers.clear()
    run = Run(None, ALL, mirror=there)
    run.save(0.3)
    assert there.asked.wait(DEADLINE_S)
    run.save(0.2, 0.1)
    assert ("epoch=0-step=3.ckpt", "epoch=0-step=2.ckpt", "epoch=0-step=1.ckpt") == run.behind
    with pytest.warns(CheckpointerWarning, match=r"the mirror remote is behind; not mirrored: .*=3.ckpt, .*=2.ckpt"):
        run.manager.close(timeout=0.05)
    run.manager.close()
    there.answers.set()


def test_mirror_that_is_down_is_said_once_and_catches_up_when_it_is_back(caplog: pytest.LogCaptureFixture) -> None:
    """However often it is tried; the end of the training does not wait for the next try."""
    there = Remote()
    there.error = OSError("no route to host")
    with Run(None, ALL, mirror=there) as run:
        run.save(0.3, 0.2)
        eventually(lambda: "no route" in run.manager.session.mirror_status.error)  # type: ignore[union-attr]
        there.asked.clear()
        assert there.asked.wait(DEADLINE_S)
        run.save(0.1)
        there.error = None
    assert [1, 2, 3] == steps(there.inner)
    assert "" == run.manager.session.mirror_status.error  # type: ignore[union-attr]
    assert 1 == sum("no route to host" in line for line in caplog.messages if "training goes on" in line)


def test_close_says_how_far_it_is(caplog: pytest.LogCaptureFixture) -> None:
    """At INFO, while it waits."""
    there = Remote()
    there.answers.clear()
    run = Run(None, ALL, mirror=there)
    run.save(0.3, 0.2)
    with caplog.at_level(logging.INFO, "checkpointer"), pytest.warns(CheckpointerWarning, match="is behind"):
        run.manager.close(timeout=0.05)
    assert "mirror remote: 22 B to go (checkpoints: 2)" in caplog.messages
    there.answers.set()


@pytest.mark.parametrize(
    ("failures", "dice", "seconds"), [(1, 0.0, 0.5), (1, 1.0, 1.0), (3, 1.0, 4.0), (7, 1.0, 60.0), (5000, 0.0, 30.0)]
)
def test_tries_come_less_and_less_often(failures: int, dice: float, seconds: float) -> None:
    """Doubled each time up to a minute, less up to half at random."""
    assert seconds == retry_after(failures, dice)


def test_next_process_goes_on_with_what_the_mirror_has_not_got() -> None:
    """A save while the mirror was down is copied after a restart."""
    here, there = MemoryStorage(), Remote()
    there.error = OSError("down")
    run = Run(here, ALL, mirror=there)
    run.save(0.3, 0.2)
    with pytest.warns(CheckpointerWarning, match="not mirrored"):
        run.manager.close(timeout=0)
    there.error = None
    with Run(here, ALL, mirror=there) as run:
        assert 2 == run.restore()
    assert [1, 2] == steps(there.inner)


def test_what_is_retired_here_before_it_was_copied_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """One line, and the rest is copied."""
    there = Remote()
    there.answers.clear()
    with Run(None, LAST, mirror=Mirror(there, keep=[KeepLast(3)])) as run:
        run.save(0.3)
        assert there.asked.wait(DEADLINE_S)
        run.save(0.2, 0.1)
        there.answers.set()
    # The first was being copied, and is said to be gone.
    said = [line for line in caplog.messages if "retired here" in line or "is gone" in line]
    assert [1, 1] == [sum(f"step={step}.ckpt" in line for line in said) for step in (1, 2)]
    assert not any("step=3.ckpt" in line for line in said)
    assert [3] == steps(there.inner)


@pytest.mark.parametrize("bytes_there", [b"", b'{"step": 2}'])
def test_payload_that_is_no_longer_what_its_record_says_is_not_copied(
    bytes_there: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Cut or replaced in the meantime: skipped with a reason, and the others are copied."""
    here, there = MemoryStorage(), Remote()
    there.answers.clear()
    with Run(here, ALL, mirror=there) as run:
        run.save(0.3)
        assert there.asked.wait(DEADLINE_S)
        here.write("epoch=0-step=1.ckpt", bytes_there)
        run.save(0.2)
        there.answers.set()
    assert [2] == steps(there.inner)
    assert 1 == sum("epoch=0-step=1.ckpt in memory has other bytes" in line for line in caplog.messages)


def test_alias_that_another_live_mirror_keeps_is_an_error_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Never silently: it is logged, and close warns."""
    there = MemoryStorage()
    policy = Policy(EverySteps(1), [KeepLast(1)], last="link")
    with Run(None, policy, mirror=there) as one:
        one.save(0.1)
        one.mirrored()
        two = Run(None, policy, mirror=there)
        two.save(0.1)
        eventually(lambda: "kept by another live manager" in two.manager.session.mirror_status.error)  # type: ignore[union-attr]
        with pytest.warns(CheckpointerWarning, match="AliasInUseError"):
            two.manager.close(timeout=0)
    assert any("AliasInUseError" in line for line in caplog.messages)


# Restoring


def train(here: Any, there: Any, *losses: float, policy: Policy = ALL, keep: Any = None, **kwargs: Any) -> None:
    """Save one checkpoint per loss, and mirror them."""
    with Run(here, policy, mirror=Mirror(there, keep=keep), **kwargs) as run:
        for loss in losses:
            run.save(loss)
            run.mirrored()


@pytest.mark.parametrize(
    ("which", "step"), [(None, 3), ("last", 3), ("best", 2), (1, 1), ("epoch=0-step=2", 2), ("epoch=0-step=2.ckpt", 2)]
)
def test_new_machine_restores_from_the_mirror_by_every_handle(which: str | int | None, step: int) -> None:
    """The payload is fetched and is then a checkpoint here like any other."""
    there, here = MemoryStorage(), MemoryStorage()
    train(MemoryStorage(), there, 0.9, 0.1, 0.5)
    with Run(here, ALL, mirror=there) as run:
        assert step == run.restore(which)
        assert [step] == [record.step for record in run.manager.records]
    assert [step] == steps(here)


def test_new_machine_goes_on_with_the_run() -> None:
    """Same run, serials go on, and the mirror's rules still know what is not here."""
    there, here = MemoryStorage(), MemoryStorage()
    keep = [KeepBest(1, "loss", mode="min"), KeepLast(1)]
    train(MemoryStorage(), there, 0.1, 0.5, policy=LAST, keep=keep)
    with Run(here, Policy(EverySteps(1), keep), mirror=there) as run:
        assert 2 == run.restore()
        run.save(0.4)
        assert 3 == run.manager.best.step  # type: ignore[union-attr]
    found = CheckpointManager(there, ALL, format=PlainFormat())
    assert [(1, 1), (3, 3)] == [(record.step, record.serial) for record in found.records]
    assert 1 == found.best.step  # type: ignore[union-attr]


def test_restoring_an_older_one_from_the_mirror_abandons_what_lies_beyond() -> None:
    """It is not here, but it must not be taken for newer than what comes."""
    there, here = MemoryStorage(), MemoryStorage()
    train(MemoryStorage(), there, 0.9, 0.1, 0.5, 0.05)
    with Run(here, ALL, mirror=there) as run:
        assert 2 == run.restore(2)
        run.save(0.3)
    with CheckpointManager(there, ALL, format=PlainFormat()) as found:
        assert [1, 2, 3] == [record.step for record in found.records]
        assert 0.3 == found.records[-1].metrics["loss"]
        assert [3, 4] == [record.step for record in found.session.manifest.abandoned]
    with Run(MemoryStorage(), ALL, mirror=there) as again:
        assert 3 == again.restore()
        assert 0.3 == again.manager.last.metrics["loss"]  # type: ignore[union-attr]
        assert 2 == again.restore("best")


def test_local_is_preferred_for_what_both_have() -> None:
    """Nothing is fetched, and a damaged copy does not matter."""
    there, here = MemoryStorage(), MemoryStorage()
    train(here, there, 0.9, 0.1)
    there.write("epoch=0-step=2.ckpt", b"damaged")
    with Run(here, ALL, mirror=there) as run:
        assert 2 == run.restore()


def test_newer_one_on_the_mirror_is_fetched() -> None:
    """An old directory of the same run, as a machine has it that was away."""
    there, old, new = MemoryStorage(), MemoryStorage(), MemoryStorage()
    train(old, there, 0.9)
    with Run(new, ALL, mirror=there) as run:
        run.restore()
        run.save(0.5, 0.4)
    with Run(old, ALL, mirror=there) as run:
        assert 3 == run.restore()
        assert [1, 3] == [record.step for record in run.manager.records]


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (lambda path: path.unlink(), "epoch=0-step=2.ckpt"),
        (lambda path: path.write_bytes(b"?" + path.read_bytes()[1:]), "epoch=0-step=2.ckpt"),
        (lambda path: path.write_bytes(b"a user's own"), "epoch=0-step=2-v1.ckpt"),
    ],
    ids=["gone", "flipped byte", "of another size"],
)
@pytest.mark.parametrize("which", [None, 2])
def test_damaged_payload_is_fetched_again(tmp_path: Path, damage: Any, name: str, which: int | None) -> None:
    """Instead of an older one. What has our size is ours to replace; anything else stays, and the copy is beside it."""
    train(tmp_path / "here", tmp_path / "there", 0.9, 0.1)
    payload = tmp_path / "here/epoch=0-step=2.ckpt"
    size = payload.stat().st_size
    damage(payload)
    missing = not payload.exists() or payload.stat().st_size != size
    with pytest.warns(CheckpointerWarning, match="not count") if missing else contextlib.nullcontext():
        opened = Run(tmp_path / "here", ALL, mirror=tmp_path / "there")
    with opened as run:
        with pytest.warns(CheckpointerWarning, match=f"it was fetched from the mirror as {name}"):
            assert 2 == run.restore(which)
        assert name == run.manager.records[-1].name
        assert 2 == len(run.manager.records)
    with Run(tmp_path / "here", ALL) as run:
        assert 2 == run.restore()
        assert 2 == len(run.manager.records)
    if name != payload.name:
        assert b"a user's own" == payload.read_bytes()


def test_damaged_on_both_sides_falls_back_to_the_next_newest() -> None:
    """And says why."""
    there, here = MemoryStorage(), MemoryStorage()
    train(here, there, 0.9, 0.1)
    here.write("epoch=0-step=2.ckpt", b"x")
    there.write("epoch=0-step=2.ckpt", b"x")
    with pytest.warns(CheckpointerWarning, match="not count"):
        opened = Run(here, ALL, mirror=there)
    with opened as run, pytest.warns(CheckpointerWarning, match="has other bytes"):
        assert 1 == run.restore()


def test_mirror_that_is_down_is_done_without_if_there_is_something_here() -> None:
    """With a warning that it may hold newer ones."""
    there, here = Remote(), MemoryStorage()
    train(here, there, 0.9)
    there.error = OSError("no route to host")
    run = Run(here, ALL, mirror=there)
    with pytest.warns(CheckpointerWarning, match="may hold, which could not be reached .*no route to host"):
        assert 1 == run.restore()
    there.error = None
    run.manager.close()


@pytest.mark.parametrize("which", [None, "best", 1, "epoch=0-step=1.ckpt"])
def test_mirror_that_is_down_is_an_error_if_there_is_nothing_here(which: str | int | None) -> None:
    """Training does not start over silently."""
    there = Remote()
    train(MemoryStorage(), there, 0.9)
    there.error = OSError("no route to host")
    with Run(MemoryStorage(), ALL, mirror=there) as run, pytest.raises(RestoreError, match="no route to host"):
        run.restore(which)


def test_both_empty_is_a_first_start() -> None:
    """None, as without a mirror."""
    with Run(None, ALL, mirror=MemoryStorage()) as run:
        assert 0 == run.restore()


def test_fetch_that_breaks_off_falls_back_and_leaves_nothing_half(tmp_path: Path) -> None:
    """A network that fails in the middle of a payload, with any error of a driver."""

    class Breaking(Remote):
        def open(self, path: str) -> BinaryIO:
            if path == "epoch=0-step=2.ckpt":
                msg = "connection reset"
                raise RuntimeError(msg)
            return super().open(path)

    inner = MemoryStorage()
    train(MemoryStorage(), inner, 0.9, 0.1)
    with Run(tmp_path, ALL, mirror=Breaking(inner)) as run:
        with pytest.warns(CheckpointerWarning, match=r"could not be fetched from remote .*connection reset"):
            assert 1 == run.restore()
        assert ["epoch=0-step=1.ckpt"] == payloads(LocalStorage(tmp_path, ""))


def test_fetch_that_would_not_fit_is_an_error_that_says_how_much_is_free() -> None:
    """Not a silent step back to an older one."""

    class Full(MemoryStorage):
        def free_space(self) -> int | None:
            return 3

    there = MemoryStorage()
    train(MemoryStorage(), there, 0.9)
    why = "takes 11 B, but memory has 3 B free; nothing was restored"
    with Run(Full(), ALL, mirror=there) as run, pytest.raises(RestoreError, match=why):
        run.restore()


def test_weights_are_fetched_if_asked_for() -> None:
    """They cannot resume a run, here or there."""
    there = MemoryStorage()
    policy = Policy(EverySteps(1), [KeepAll()], contents="weights")
    with pytest.warns(CheckpointerWarning, match="cannot resume"):
        train(MemoryStorage(), there, 0.9, policy=policy)
    with Run(None, LAST, mirror=there) as run:
        with pytest.raises(RestoreError, match="only weights"):
            run.restore()
        assert 1 == run.restore(contents="any")


@pytest.mark.parametrize("kind", ["path", "url"])
def test_folders_are_copied_and_fetched(tmp_path: Path, kind: str) -> None:
    """To a disk in one step; to where there are only files they count when the record says so."""

    def save(path: str) -> None:
        (Path(path) / "sub").mkdir(parents=True)
        (Path(path) / "a").write_bytes(b"a" * 10)
        (Path(path) / "sub/b").write_bytes(b"b")

    there = str(tmp_path / "there") if kind == "path" else f"memory://{tmp_path.name}"
    with Run(tmp_path / "here", LAST, state=None, save=save, mirror=there) as run:
        run.save(0.1)
        run.mirrored()
        run.save(0.2)
    storage = CheckpointManager(there, LAST, format=PlainFormat())._directory.storage
    assert ["epoch=0-step=2.ckpt/a", "epoch=0-step=2.ckpt/sub/b"] == payloads(storage)
    with Run(tmp_path / "new", LAST, state=None, save=save, mirror=there) as run:
        with pytest.raises(RestoreError, match="is a folder that a trainer wrote"):
            run.restore()
        assert b"b" == (tmp_path / "new" / run.manager.last.name / "sub/b").read_bytes()  # type: ignore[union-attr]


def test_listing_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    """Names on the mirror come from others."""

    class Hostile(MemoryStorage):
        def list(self, prefix: str = "") -> dict[str, Stat]:
            found = super().list(prefix)
            return found | {"epoch=0-step=1.ckpt/../../evil": Stat(1, "")} if "step=1" in prefix else found

    there = Hostile()
    train(MemoryStorage(), MemoryStorage(), 0.9)
    with Run(MemoryStorage(), ALL) as run:
        run.save(0.1)
        record = run.manager.records[0]
    inner = run.manager._directory.storage
    for path in inner.list():
        there.write(path, inner.open(path).read())
    why = "must stay inside the directory"
    with Run(tmp_path / "here", ALL, mirror=there) as run, pytest.raises(CheckpointerError, match=why):
        run.restore(record.name)
    assert not (tmp_path / "evil").exists()


def test_host_that_resumes_by_its_own_state_passes_what_the_mirror_holds() -> None:
    """A new machine whose host calls load_state_dict instead of restore."""
    there = MemoryStorage()
    with Run(MemoryStorage(), LAST, mirror=there) as run:
        run.save(0.9, 0.8, 0.7)
        state = run.manager.session.state_dict()
    with Run(MemoryStorage(), LAST, mirror=there) as run:
        run.manager.session.load_state_dict(state)
        run.step = 3
        run.save(0.6)
        run.mirrored()
        assert run.manager.last.serial > 3  # type: ignore[union-attr]
    assert [4] == steps(there)


# Construction


def test_directory_as_its_own_mirror_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it is spelt."""
    monkeypatch.chdir(tmp_path)
    storage = MemoryStorage()
    for here, there in (
        ("run", tmp_path / "run"),
        (tmp_path / "run", "x/../run/"),
        ("run", f"file://{tmp_path}/run"),
        ("memory://run", "memory://run/"),
        (storage, storage),
    ):
        with pytest.raises(StorageError, match="is the directory itself"):
            Run(here, mirror=there)


def test_directory_as_its_own_mirror_by_a_link_is_an_error_that_is_said(tmp_path: Path) -> None:
    """Found out on the thread: nothing is asked of a disk before."""
    (tmp_path / "link").symlink_to(tmp_path / "run", target_is_directory=True)
    run = Run(tmp_path / "run", ALL, mirror=Mirror(tmp_path / "link", keep=[KeepLast(1)]))
    run.save(0.1, 0.2)
    eventually(lambda: "is the directory itself" in run.manager.session.mirror_status.error)  # type: ignore[union-attr]
    with pytest.warns(CheckpointerWarning, match="is the directory itself"):
        run.manager.close(timeout=0)
    assert [1, 2] == steps(tmp_path / "run")


def test_alias_on_the_mirror_goes_on_after_an_outage() -> None:
    """The mirror is its own heir: what it claimed before does not stand in its way."""
    there = Remote()
    policy = Policy(EverySteps(1), [KeepLast(1)], last="link")
    with Run(None, policy, mirror=there) as run:
        run.save(0.1)
        run.mirrored()
        there.error = OSError("no route to host")
        run.save(0.2)
        eventually(lambda: run.manager.session.mirror_status.error != "")  # type: ignore[union-attr]
        there.error = None
    assert {"step": 2} == json.load(there.inner.open("last.ckpt"))


def test_restore_does_not_wait_for_a_mirror_that_never_answers() -> None:
    """It goes on after a while; here a short one."""
    there = Remote()
    with Run(MemoryStorage(), ALL, mirror=there) as run:
        there.answers.clear()
        assert run.manager._mirror is not None
        problem = "what the mirror remote may hold, which could not be reached (TimeoutError: no answer within 0.05 s)"
        assert (problem,) == run.manager._mirror.look(0.05).problems
        there.answers.set()


def test_folder_that_changed_is_not_copied_to_where_there_are_only_files(tmp_path: Path) -> None:
    """Its uploaded files are deleted."""

    def save(path: str) -> None:
        Path(path).mkdir()
        for name in "ab":
            (Path(path) / name).write_bytes(b"x" * 10)

    there = Remote()
    there.answers.clear()
    with Run(tmp_path, LAST, state=None, save=save, mirror=there) as run:
        run.save(0.1)
        (tmp_path / "epoch=0-step=1.ckpt/b").write_bytes(b"y" * 10)
        there.answers.set()
    assert [] == payloads(there.inner)
    uploaded = [path for path in there.uploaded if not path.startswith(".checkpointer/")]
    assert ["epoch=0-step=1.ckpt/a", "epoch=0-step=1.ckpt/b"] == uploaded


def test_disk_that_cannot_read_its_payload_takes_the_mirrors() -> None:
    """An input/output error here, not another content."""

    class Broken(MemoryStorage):
        def open(self, path: str) -> BinaryIO:
            if path == "epoch=0-step=2.ckpt" and not self.replaced:
                raise OSError(5, "input/output error", path)
            return super().open(path)

        replaced = False

        def upload(self, path: str) -> Any:
            self.replaced = path == "epoch=0-step=2.ckpt"
            return super().upload(path)

    there, sound, broken = MemoryStorage(), MemoryStorage(), Broken()
    train(sound, there, 0.9, 0.1)
    for path in sound.list():
        broken.write(path, sound.open(path).read())
    with (
        Run(broken, ALL, mirror=there) as run,
        pytest.warns(CheckpointerWarning, match="it was fetched from the mirror"),
    ):
        assert 2 == run.restore()
