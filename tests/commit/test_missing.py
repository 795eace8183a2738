"""Checkpoints whose payload is gone: what is ranked, aliased, listed, counted and believed is what exists."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import attrs
import pytest
import torch
from support.commands import command, snapshot, train
from support.plain_format import PlainFormat

from checkpointer import (
    CheckpointerWarning,
    CheckpointManager,
    EverySteps,
    HMACKey,
    KeepAll,
    KeepBest,
    KeepEvery,
    KeepLast,
    Naming,
    Policy,
    Record,
)
from checkpointer.commit.index import record_path
from checkpointer.errors import NotFoundError, NoValidCheckpointError
from checkpointer.ports import Stat, Writable
from checkpointer.storage import LocalStorage
from checkpointer.storage.owner import new_owner
from checkpointer.testing import Crash, CrashingStorage, FakeClock, MemoryStorage, die

BEST = KeepBest(2, "loss", mode="min")
BEST_ONLY = Policy(EverySteps(1), [BEST])
WITH_ALIASES = Policy(EverySteps(1), [BEST, KeepLast(1)], last="link", best="link")
ALL = Policy(EverySteps(1), [BEST, KeepAll()])


def opened(where: Any, policy: Policy = BEST_ONLY, *, state: Any = 1, **kw: Any) -> CheckpointManager:
    """Return a manager that saves a small state."""
    return CheckpointManager(where, policy, state=lambda: {"w": state}, format=PlainFormat(), **kw)


def save(manager: CheckpointManager, *losses: float | None, start: int = 1) -> list[str]:
    """Report losses at steps from ``start`` on, and return the names of what was saved."""
    names = []
    for step, loss in enumerate(losses, start=start):
        decision = manager.observe({} if loss is None else {"loss": loss}, step=step, epoch=0, epoch_end=False)
        names += [decision.name] if decision else []
    return names


def trained(where: Any, policy: Policy, *losses: float | None) -> list[str]:
    """Train in a process that ends, and return the names of what was saved."""
    with opened(where, policy) as manager:
        return save(manager, *losses)


def payloads(folder: Path) -> list[str]:
    """Return the names of the checkpoint files that are really there."""
    return sorted(path.name for path in folder.glob("*.ckpt") if not path.is_symlink())


def links(folder: Path) -> dict[str, str]:
    """Return each link of a folder, and what it leads to: that has to exist."""
    found = {path.name: os.readlink(path) for path in sorted(folder.iterdir()) if path.is_symlink()}
    assert all((folder / target).exists() for target in found.values())
    return found


def gone() -> Any:
    """The block must warn that payloads are gone."""
    return pytest.warns(CheckpointerWarning, match="not count")


# In the process that trains


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_better_checkpoints_are_not_retired_for_files_that_are_gone(tmp_path: Path, where: str) -> None:
    """Both of the best two are deleted in mid-training: the next reports are ranked among what exists."""
    storage = LocalStorage(tmp_path, new_owner()) if where == "disk" else MemoryStorage()
    with opened(storage) as manager:
        for name in save(manager, 0.1, 0.2):
            storage.delete(name)
        with pytest.warns(CheckpointerWarning, match=r"step=1.ckpt, epoch=0-step=2.ckpt are gone, .* do not count"):
            save(manager, 1.0, 0.9, 2.0, start=3)
        assert manager.best is not None
        assert "epoch=0-step=4.ckpt" == manager.best.name
    assert ["epoch=0-step=3.ckpt", "epoch=0-step=4.ckpt"] == sorted(storage.list(), key=len)[:2]


def test_a_truncated_checkpoint_does_not_push_out_a_whole_one(tmp_path: Path) -> None:
    """A file of another size is not the payload, and it is not touched."""
    with opened(tmp_path, Policy(EverySteps(1), [KeepBest(1, "loss", mode="min"), KeepLast(1)])) as manager:
        save(manager, 0.1, 0.2)
        os.truncate(tmp_path / "epoch=0-step=1.ckpt", 3)
        with gone():
            save(manager, 0.3, start=3)
    assert ["epoch=0-step=1.ckpt", "epoch=0-step=2.ckpt", "epoch=0-step=3.ckpt"] == payloads(tmp_path)


def test_a_file_whose_record_was_deleted_does_not_push_out_a_checkpoint(tmp_path: Path) -> None:
    """The next process would not know of it."""
    with opened(tmp_path, Policy(EverySteps(1), [KeepBest(1, "loss", mode="min"), KeepLast(1)])) as manager:
        save(manager, 0.1, 0.2)
        (tmp_path / record_path("epoch=0-step=1.ckpt")).unlink()
        expected = (
            r"^epoch=0-step=1.ckpt has a payload but no record any more, and does not count; "
            r"the best is epoch=0-step=2.ckpt now, not epoch=0-step=1.ckpt$"
        )
        with pytest.warns(CheckpointerWarning, match=expected):
            save(manager, 0.3, start=3)
        assert [2, 3] == [record.step for record in manager.records]
    assert (tmp_path / "epoch=0-step=1.ckpt").exists()


def test_a_lost_record_and_a_lost_payload_have_different_messages(tmp_path: Path) -> None:
    """One warning names both, each with what is true of it."""
    with opened(tmp_path, ALL) as manager:
        save(manager, 0.1, 0.2, 0.3)
        for name in ("epoch=0-step=1.ckpt", "epoch=0-step=2.ckpt"):
            (tmp_path / record_path(name)).unlink()
        (tmp_path / "epoch=0-step=3.ckpt").unlink()
        expected = (
            r"^epoch=0-step=3.ckpt is gone, .* does not count; epoch=0-step=1.ckpt, epoch=0-step=2.ckpt have a payload "
            r"but no record any more, and do not count; the best is epoch=0-step=4.ckpt now"
        )
        with pytest.warns(CheckpointerWarning, match=expected):
            save(manager, 0.4, start=4)


def test_the_last_two_are_two_that_exist(tmp_path: Path) -> None:
    """One of them is deleted: the one before takes its place."""
    with opened(tmp_path, Policy(EverySteps(1), [KeepLast(2)])) as manager:
        save(manager, None, None, None)
        (tmp_path / "epoch=0-step=3.ckpt").unlink()
        with gone():
            save(manager, None, start=4)
    assert ["epoch=0-step=2.ckpt", "epoch=0-step=4.ckpt"] == payloads(tmp_path)


def test_thinning_keeps_the_next_of_an_interval_whose_first_is_gone(tmp_path: Path) -> None:
    """One checkpoint of each interval is kept for good: one that exists."""
    with opened(tmp_path, Policy(EverySteps(1), [KeepEvery(steps=10), KeepLast(1)])) as manager:
        save(manager, None, start=10)
        (tmp_path / "epoch=0-step=10.ckpt").unlink()
        save(manager, None, start=11)
        with gone():
            save(manager, None, start=12)
    assert ["epoch=0-step=11.ckpt", "epoch=0-step=12.ckpt"] == payloads(tmp_path)


def test_a_rule_of_ones_own_is_asked_what_it_keeps(tmp_path: Path) -> None:
    """The manager looks at the kept ones before it retires another."""

    class KeepOdd:
        def keep(self, history: Sequence[Record]) -> Mapping[str, str]:
            return {record.name: "odd" for record in history if record.step % 2} or {history[0].name: "first"}

    with opened(tmp_path, Policy(EverySteps(1), [KeepOdd(), KeepLast(1)])) as manager:
        save(manager, None, None)
        (tmp_path / "epoch=0-step=1.ckpt").unlink()
        with gone():
            save(manager, None, start=4)
    assert ["epoch=0-step=2.ckpt", "epoch=0-step=4.ckpt"] == payloads(tmp_path)


def test_a_name_is_not_taken_from_a_checkpoint_that_has_to_stay(tmp_path: Path) -> None:
    """A save may take the name of what it retires: not if that goes for a file that is gone."""
    keep = [KeepBest(1, "loss", mode="min"), KeepLast(1)]
    with opened(tmp_path, Policy(EverySteps(1), keep, name=Naming("model"))) as manager:
        assert ["model.ckpt", "model-v1.ckpt"] == save(manager, 0.1, 0.2)
        (tmp_path / "model.ckpt").unlink()
        with gone():
            assert ["model-v2.ckpt"] == save(manager, 9.0, start=3)
        assert manager.best is not None
        assert 2 == manager.best.step
    assert ["model-v1.ckpt", "model-v2.ckpt"] == payloads(tmp_path)


@pytest.mark.parametrize("background", [None, "wait"])
def test_the_whole_directory_may_be_removed_while_a_training_runs(tmp_path: Path, background: Any) -> None:
    """It goes on, with what it saves from then on; and the next process finds the aliases to be its own."""
    folder = tmp_path / "run"
    with opened(folder, WITH_ALIASES, background=background) as manager:
        save(manager, 0.1, 0.2, 0.3)
        manager.wait()
        shutil.rmtree(folder)
        with gone():
            save(manager, 0.9, start=4)
            manager.wait()
        save(manager, 0.8, start=5)
        manager.wait()
        assert [4, 5] == [record.step for record in manager.records]
        assert (5, 5) == (manager.best and manager.best.step, manager.last and manager.last.step)
    assert {"best.ckpt": "epoch=0-step=5.ckpt", "last.ckpt": "epoch=0-step=5.ckpt"} == links(folder)
    with opened(folder, WITH_ALIASES) as manager:
        restored = manager.restore()
        assert restored is not None
        assert 5 == restored.step
        save(manager, 0.95, start=6)
    assert {"best.ckpt": "epoch=0-step=5.ckpt", "last.ckpt": "epoch=0-step=6.ckpt"} == links(folder)


class RemovingFormat(PlainFormat):
    """Removes a folder, once, while a payload is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.is_armed = False

    def write(self, state: Any, stream: Writable) -> None:
        """Write it all."""
        super().write(state, stream)
        if self.is_armed:
            self.is_armed = False
            shutil.rmtree(self.folder)


@pytest.mark.filterwarnings("ignore:.* not count:checkpointer.CheckpointerWarning")
@pytest.mark.parametrize("policy", [WITH_ALIASES, Policy(EverySteps(1), [KeepLast(1)], name="model")])
@pytest.mark.parametrize("what", [".", ".checkpointer", ".checkpointer/staging"])
def test_a_directory_that_is_removed_during_a_save_gets_the_checkpoint(
    tmp_path: Path, what: str, policy: Policy
) -> None:
    """The save is written once more: the training has the state, and the disk has nothing."""
    payload = RemovingFormat(tmp_path / "run" / what)
    with CheckpointManager(tmp_path / "run", policy, state=lambda: {"w": 1}, format=payload) as manager:
        save(manager, 0.1)
        payload.is_armed = True
        save(manager, 0.2, start=2)
    with opened(tmp_path / "run", policy) as manager:
        restored = manager.restore()
        assert restored is not None
        assert 2 == restored.step


class RemovedStorage(LocalStorage):
    """Loses all its files at the n-th thing that is done to it."""

    def __init__(self, root: Path, at: int) -> None:
        super().__init__(root, new_owner())
        self.root, self.left = root, at
        self.is_armed = self.is_done = False

    def _step(self) -> None:
        self.left -= self.is_armed
        if self.left == 0 and not self.is_done:
            self.is_done = True
            os.rename(self.root, f"{self.root}-removed")  # In one step, even if another thread writes there.

    def list(self, prefix: str = "") -> dict[str, Stat]:
        """List, and lose it all before or after."""
        self._step()
        found = super().list(prefix)
        self._step()
        return found

    def _new_staged(self) -> Path:
        staged = super()._new_staged()
        self._step()
        return staged

    def open(self, path: str) -> BinaryIO:
        """Open a file, if it is there still."""
        self._step()
        return super().open(path)

    def delete(self, path: str) -> None:
        """Delete, and lose the rest before."""
        self._step()
        super().delete(path)


@pytest.mark.filterwarnings("ignore::checkpointer.CheckpointerWarning")
@pytest.mark.parametrize("background", [None, "wait"])
@pytest.mark.parametrize(
    "policy",
    [WITH_ALIASES, Policy(EverySteps(1), [KeepBest(1, "loss", mode="min")], last="copy", best="copy")],
    ids=["links", "slot"],
)
def test_a_directory_that_is_removed_at_any_moment_ends_no_training(
    tmp_path: Path, policy: Policy, background: Any
) -> None:
    """A save and late metrics that move a slot: whenever all files vanish, the next save is there."""
    for at in range(1 if background is None else 2, 500, 4):
        storage = RemovedStorage(tmp_path / f"run-{at}", at)
        with opened(storage, policy, background=background) as manager:
            save(manager, 0.5, 0.6)
            manager.wait()
            storage.is_armed = True
            manager.observe({"loss": 0.1}, step=2, epoch=0, epoch_end=False)
            save(manager, 0.3, start=3)
            manager.wait()
            storage.is_armed = False
            save(manager, 0.2, start=4)
            manager.wait()
            assert manager.last is not None
            assert 4 == manager.last.step
            assert (storage.root / manager.last.name).exists()
        if not storage.is_done:
            break
    assert 20 < at < 490


class LosingStorage(LocalStorage):
    """Loses the record of the first checkpoint after its commit, at a moment that the test chooses."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, new_owner())
        self.moment = threading.Event()
        self.is_done = False

    def write(self, path: str, data: bytes) -> None:
        """Write it, and lose it if it is that one."""
        super().write(path, data)
        if path == record_path("model.ckpt") and b'"committed"' in data and not self.is_done:
            self.is_done = self.moment.wait(10)
            self.delete(path)


def test_a_checkpoint_that_is_to_be_replaced_may_be_lost_before_the_save_begins(tmp_path: Path) -> None:
    """The save takes another name then: a file without a record is not replaced."""
    storage = LosingStorage(tmp_path)
    policy = Policy(EverySteps(1), [KeepLast(1)], name=Naming("model", version_counter=False))
    with opened(storage, policy, background="wait") as manager:
        save(manager, 0.1)
        manager.observe({"late": 1.0}, step=1, epoch=0, epoch_end=False)  # The writer thread looks at it for this.
        decision = manager.session.decide({}, step=2, epoch=0, epoch_end=False)
        storage.moment.set()
        with gone():
            manager.session.commit(decision)
            manager.wait()
        assert [("model-v1.ckpt", 2)] == [(record.name, record.step) for record in manager.records]
    assert ["model-v1.ckpt", "model.ckpt"] == payloads(tmp_path)


def test_a_directory_that_is_removed_without_a_ranking_keeps_its_alias(tmp_path: Path) -> None:
    """A retirement needs no look there; the marker of the alias is written again nevertheless."""
    folder, policy = tmp_path / "run", Policy(EverySteps(1), [KeepLast(1)], last="link")
    with opened(folder, policy) as manager:
        save(manager, None, None)
        shutil.rmtree(folder)
        save(manager, None, start=3)
    with opened(folder, policy) as manager:
        manager.restore()
        save(manager, None, start=4)
    assert {"last.ckpt": "epoch=0-step=4.ckpt"} == links(folder)


def test_a_link_to_what_is_gone_is_removed_when_nothing_takes_its_place(tmp_path: Path) -> None:
    """The only ranked checkpoint was deleted: there is no best."""
    policy = Policy(EverySteps(1), [KeepBest(1, "loss", mode="min"), KeepLast(2)], best="link")
    with opened(tmp_path, policy) as manager:
        save(manager, 0.1, None)
        (tmp_path / "epoch=0-step=1.ckpt").unlink()
        with gone():
            save(manager, None, start=3)
        assert manager.best is None
    assert {} == links(tmp_path)


def test_a_slot_that_is_gone_gets_no_metrics(tmp_path: Path) -> None:
    """Training goes on; the next save is under the alias again."""
    policy = Policy(EverySteps(1), [KeepBest(1, "loss", mode="min")], last="copy")
    with opened(tmp_path, policy) as manager:
        assert ["epoch=0-step=1.ckpt", "last.ckpt"] == save(manager, 0.1, 0.5)
        (tmp_path / "last.ckpt").unlink()
        with gone():
            manager.observe({"loss": 0.01}, step=2, epoch=0, epoch_end=False)
        assert ["last.ckpt"] == save(manager, 0.6, start=3)
        assert [1, 3] == [record.step for record in manager.records]


def test_what_is_worse_than_files_that_are_gone_gets_a_name_of_its_own(tmp_path: Path) -> None:
    """Under the alias alone the next save would replace the best that exists."""
    policy = Policy(EverySteps(1), [KeepBest(1, "loss", mode="min")], last="copy")
    with opened(tmp_path, policy) as manager:
        save(manager, 0.1)
        (tmp_path / "epoch=0-step=1.ckpt").unlink()
        with gone():
            assert ["epoch=0-step=2.ckpt"] == save(manager, 0.5, start=2)
        assert ["last.ckpt"] == save(manager, 0.9, start=3)
    assert ["epoch=0-step=2.ckpt", "last.ckpt"] == payloads(tmp_path)


def test_what_is_gone_is_not_pinned(tmp_path: Path) -> None:
    """A slot would have to be copied first."""
    with opened(tmp_path, Policy(EverySteps(1), [KeepBest(1, "loss", mode="min")], last="copy")) as manager:
        save(manager, 0.1, 0.5)
        (tmp_path / "last.ckpt").unlink()
        with gone(), pytest.raises(NotFoundError, match=r"last.ckpt is gone, and cannot be pinned"):
            manager.pin("last.ckpt")


def test_a_name_is_given_free_by_what_is_gone(tmp_path: Path) -> None:
    """For a trainer that writes under that very name; the record stays, under another."""
    with opened(tmp_path) as manager:
        save(manager, 0.1, 0.2)
        (tmp_path / "epoch=0-step=2.ckpt").unlink()
        with gone():
            assert manager.session.make_way("epoch=0-step=2.ckpt") is None
        assert not (tmp_path / record_path("epoch=0-step=2.ckpt")).exists()
        assert (tmp_path / record_path("earlier-epoch=0-step=2.ckpt")).exists()


class Far(MemoryStorage):
    """A storage without links, as those elsewhere are, that counts what it is asked; its listings may lag."""

    symlink = hardlink = None  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.unlisted: set[str] = set()
        self.error: OSError | None = None

    def list(self, prefix: str = "") -> dict[str, Stat]:
        self.asked.append(prefix)
        if self.error is not None and prefix == "epoch=0-step=1.ckpt":
            raise self.error
        return {name: stat for name, stat in super().list(prefix).items() if name not in self.unlisted}


def test_elsewhere_a_save_that_retires_asks_once_for_the_best() -> None:
    """And one that retires nothing does not ask at all."""
    storage = Far()
    with opened(storage, Policy(EverySteps(1), [KeepBest(3, "loss", mode="min"), KeepLast(1)])) as manager:
        save(manager, 0.1, 0.2, 0.3)
        for start, loss, looks in ((4, 0.9, 0), (5, 0.95, 1), (6, 0.05, 1)):
            storage.asked.clear()
            save(manager, loss, start=start)
            best = "epoch=0-step=1.ckpt"
            assert looks == storage.asked.count(best), (start, storage.asked)
    storage = Far()
    with opened(storage, Policy(EverySteps(1), [KeepBest(1, "loss", mode="min"), KeepLast(1)])) as manager:
        save(manager, 0.1, 0.2)
        storage.delete("epoch=0-step=1.ckpt")
        with gone():
            save(manager, 0.3, start=3)
        assert manager.best is not None
        assert 2 == manager.best.step


def test_elsewhere_a_declined_report_asks_once_a_minute() -> None:
    """Reports may be declined at every step; what is gone makes none of them wait for ever."""
    storage, clock = Far(), FakeClock()
    with opened(storage, Policy(EverySteps(1), [KeepBest(1, "loss", mode="min")]), clock=clock) as manager:
        save(manager, 0.1)
        storage.asked.clear()
        assert [] == save(manager, 0.2, 0.3, 0.4, start=2)
        assert ["epoch=0-step=1.ckpt"] == storage.asked
        storage.delete("epoch=0-step=1.ckpt")
        assert [] == save(manager, 0.5, start=5)
        clock.advance(60)
        with gone():
            assert ["epoch=0-step=6.ckpt"] == save(manager, 0.6, start=6)


def test_nothing_is_retired_while_the_storage_does_not_answer() -> None:
    """Whether what would be kept is there is not known; the next save retires both."""
    storage = Far()
    with opened(storage, Policy(EverySteps(1), [KeepBest(1, "loss", mode="min"), KeepLast(1)])) as manager:
        save(manager, 0.1, 0.2)
        storage.error = OSError("no route to host")
        with pytest.warns(CheckpointerWarning, match="no old checkpoint is removed, .*no route to host"):
            save(manager, 0.3, start=3)
        storage.error = None
        save(manager, 0.4, start=4)
        assert [1, 4] == [record.step for record in manager.records]


# In a new process


def test_a_new_process_counts_only_what_is_there(tmp_path: Path) -> None:
    """One warning at the start names what is gone, and what is the newest and the best now."""
    trained(tmp_path, ALL, 0.1, 0.2, 0.3, 0.4)
    for step in (1, 4):
        (tmp_path / f"epoch=0-step={step}.ckpt").unlink()
    expected = (
        "epoch=0-step=1.ckpt, epoch=0-step=4.ckpt are gone, or have another size than their records say, and do not "
        "count; the newest is epoch=0-step=3.ckpt now, not epoch=0-step=4.ckpt; the best is epoch=0-step=2.ckpt now, "
        "not epoch=0-step=1.ckpt"
    )
    with pytest.warns(CheckpointerWarning) as warned:
        manager = opened(tmp_path, ALL)
    assert [f"{tmp_path}: {expected}"] == [str(warning.message) for warning in warned]
    assert __file__ == warned[0].filename
    with manager:
        assert [2, 3] == [record.step for record in manager.records]
        assert (2, 3) == (manager.best and manager.best.step, manager.last and manager.last.step)
        assert {"epoch=0-step=2.ckpt", "epoch=0-step=3.ckpt"} == {*map(os.path.basename, manager.to_yaml())}


def test_better_ones_are_not_retired_by_a_new_process_either(tmp_path: Path) -> None:
    """The records of lost payloads do not let another checkpoint be retired, and stay."""
    for name in trained(tmp_path, BEST_ONLY, 0.1, 0.2):
        (tmp_path / name).unlink()
    with gone():
        manager = opened(tmp_path)
    with manager:
        assert manager.best is None
        save(manager, 1.0, 0.9, 2.0, start=3)
        best = manager.restore("best")
        assert best is not None
        assert 4 == best.step
    assert ["epoch=0-step=3.ckpt", "epoch=0-step=4.ckpt"] == payloads(tmp_path)
    assert (tmp_path / record_path("epoch=0-step=1.ckpt")).exists()


def test_only_records_without_payloads_are_an_error_that_names_them(tmp_path: Path) -> None:
    """The user expects checkpoints there, so the training does not start over silently."""
    for name in trained(tmp_path, ALL, 0.1, 0.2):
        (tmp_path / name).unlink()
    with gone():
        manager = opened(tmp_path, ALL)
    with manager, pytest.raises(NoValidCheckpointError, match=r"step=2.ckpt is gone.*step=1.ckpt is gone"):
        manager.restore()


def test_a_payload_that_comes_back_counts_again_and_its_name_stayed_taken(tmp_path: Path) -> None:
    """It was moved away for room, and the run goes on without it; then it is put back."""
    trained(tmp_path, ALL, 0.3, 0.1)
    payload = tmp_path / "epoch=0-step=2.ckpt"
    data = payload.read_bytes()
    payload.unlink()
    with gone():
        manager = opened(tmp_path, ALL)
    with manager:
        with pytest.warns(CheckpointerWarning, match="restored epoch=0-step=1.ckpt"):
            manager.restore()
        assert ["epoch=0-step=2-v1.ckpt"] == save(manager, 0.2, start=2)
    payload.write_bytes(data)
    with opened(tmp_path, ALL) as manager:
        # The run went back to step 1 in between: what lay beyond is another timeline.
        assert ["epoch=0-step=1.ckpt", "epoch=0-step=2-v1.ckpt"] == [record.name for record in manager.records]
        assert [payload.name] == [record.name for record in manager.session.manifest.abandoned]


def test_the_error_for_many_payloads_that_are_gone_is_short_and_its_way_out_works(tmp_path: Path) -> None:
    """It names the newest few and how many more there are; if the records are removed, a run starts over."""
    for name in trained(tmp_path, ALL, *[0.1] * 9):
        (tmp_path / name).unlink()
    expected = (
        r"step=9.ckpt is gone, .*step=5.ckpt is gone, though its record is there; and 4 more\. Training does not start "
        r"over silently: put a payload back, or to start over remove the records in \.checkpointer/records, or use"
    )
    with gone():
        manager = opened(tmp_path, ALL)
    with manager, pytest.raises(NoValidCheckpointError, match=expected):
        manager.restore()
    shutil.rmtree(tmp_path / ".checkpointer/records")
    with opened(tmp_path, ALL) as manager:
        assert manager.restore() is None
        assert ["epoch=0-step=1.ckpt"] == save(manager, 0.1)


@pytest.mark.parametrize("where", ["disk", "memory", "elsewhere"])
def test_without_a_version_counter_the_name_of_what_is_gone_is_free(tmp_path: Path, where: str) -> None:
    """The next checkpoint of that name gets it; a file of another size under the name is not replaced."""
    storage: Any = {"disk": LocalStorage(tmp_path, new_owner()), "memory": MemoryStorage(), "elsewhere": Far()}[where]
    policy = Policy(EverySteps(1), [KeepLast(1)], name=Naming("model", version_counter=False))
    trained(storage, policy, None)
    storage.delete("model.ckpt")
    with gone():
        manager = opened(storage, policy)
    with manager:
        assert ["model.ckpt"] == save(manager, None, start=2)
    with opened(storage, policy) as manager:
        restored = manager.restore()
        assert restored is not None
        assert ("model.ckpt", 2) == (restored.record.name, restored.step)
        assert ["model.ckpt"] == save(manager, None, start=3)
    storage.write("model.ckpt", b"of others")
    with gone():
        manager = opened(storage, policy)
    with manager:
        assert ["model-v1.ckpt"] == save(manager, None, start=4)
    with storage.open("model.ckpt") as stream:
        assert b"of others" == stream.read()


def test_without_a_version_counter_a_folder_that_is_gone_gives_its_name_free(tmp_path: Path) -> None:
    """A folder is not replaced in one step, but there is none."""

    def write(path: str) -> None:
        os.makedirs(path)
        Path(path, "a").write_text("a")

    policy = Policy(EverySteps(1), [KeepLast(1)], name=Naming("model", version_counter=False))
    with CheckpointManager(tmp_path, policy, save=write) as manager:
        save(manager, None)
    shutil.rmtree(tmp_path / "model.ckpt")
    with gone():
        manager = CheckpointManager(tmp_path, policy, save=write)
    with manager:
        assert ["model.ckpt"] == save(manager, None, start=2)


def test_a_payload_that_comes_back_before_the_restore_is_restored(tmp_path: Path) -> None:
    """The payloads that are there at that time count."""
    trained(tmp_path, ALL, 0.3, 0.1)
    payload = tmp_path / "epoch=0-step=2.ckpt"
    data = payload.read_bytes()
    payload.unlink()
    with gone():
        manager = opened(tmp_path, ALL)
    payload.write_bytes(data)
    with manager:
        restored = manager.restore()
        assert restored is not None
        assert 2 == restored.step
        assert [1, 2] == [record.step for record in manager.records]


def test_what_was_abandoned_stays_so_when_the_newest_is_gone(tmp_path: Path) -> None:
    """A record without its payload still says where the run went back to."""
    trained(tmp_path, ALL, 0.3, 0.2, 0.1)
    with opened(tmp_path, ALL) as manager:
        manager.restore(1)
        name = save(manager, 0.5, start=2)[0]
    (tmp_path / name).unlink()
    with gone():
        manager = opened(tmp_path, ALL)
    with manager:
        assert [1] == [record.step for record in manager.records]


def test_a_folder_without_one_of_its_files_is_gone(tmp_path: Path) -> None:
    """Its size is that of all its files."""

    def write(path: str) -> None:
        os.makedirs(path)
        for name in ("a", "b"):
            Path(path, name).write_text(name * 10)

    policy = Policy(EverySteps(1), [KeepAll()])
    with CheckpointManager(tmp_path, policy, save=write) as manager:
        save(manager, None, None)
    (tmp_path / "epoch=0-step=2.ckpt/b").unlink()
    with gone():
        manager = CheckpointManager(tmp_path, policy, save=write)
    with manager:
        assert [1] == [record.step for record in manager.records]


def test_a_listing_that_lags_hides_no_checkpoint() -> None:
    """A payload that can be opened is there, even if the listing lacks it."""
    storage = Far()
    trained(storage, ALL, 0.1, 0.2)
    storage.unlisted = {"epoch=0-step=2.ckpt"}
    with opened(storage, ALL) as manager:
        assert [1, 2] == [record.step for record in manager.records]


def test_a_replacement_that_was_interrupted_is_not_taken_for_a_checkpoint_that_is_gone() -> None:
    """The record announces a payload of another size than the one that still lies there."""
    policy = Policy(EverySteps(1), [KeepLast(1)], name=Naming("model", version_counter=False))
    sizes = set()
    for at in range(1, 200):
        inner = MemoryStorage()
        trained(inner, policy, None)
        storage, owner = CrashingStorage(inner, at=at), ""
        with contextlib.suppress(Crash):
            manager = opened(storage, policy, state="longer than before")
            owner = manager._owner
            manager.restore()
            save(manager, None, start=2)
        die(owner)
        with opened(inner, policy) as again:
            assert again.last is not None
            sizes.add(again.last.size)
        if not storage.is_dead:
            break
    assert 2 == len(sizes)


def test_an_unsigned_record_is_never_among_what_is_gone(tmp_path: Path) -> None:
    """With a key, records that it has not signed are damaged; those that it has signed are looked after as any."""
    key = HMACKey(b"k" * 32)
    with opened(tmp_path, ALL, trust=key) as manager:
        save(manager, 0.1, 0.2)
    (tmp_path / "epoch=0-step=1.ckpt").unlink()
    with gone():
        manager = opened(tmp_path, ALL, trust=key)
    with manager:
        assert [2] == [record.step for record in manager.records]


def test_what_is_gone_from_a_mirror_is_copied_there_again(tmp_path: Path) -> None:
    """The mirror ranks what it has, as the directory does."""
    here, there = tmp_path / "here", tmp_path / "there"
    with opened(here, ALL, mirror=there) as manager:
        save(manager, 0.1, 0.2)
    (there / "epoch=0-step=1.ckpt").unlink()
    with opened(here, ALL, mirror=there) as manager:
        manager.restore()
        save(manager, 0.3, start=3)
    with contextlib.closing(CheckpointManager(there, ALL)) as mirror:
        assert {1, 2, 3} == {record.step for record in mirror.records}


# Where a run goes on


@pytest.mark.parametrize("which", ["best", 1])
def test_going_back_says_what_a_restart_would_do(
    tmp_path: Path, which: str | int, caplog: pytest.LogCaptureFixture
) -> None:
    """A restore writes nothing: until the next save a restart goes on from the newest, as before."""
    trained(tmp_path, ALL, 0.1, 0.2)
    caplog.set_level(logging.WARNING, "checkpointer")
    with opened(tmp_path, ALL) as manager:
        manager.restore()
        assert [] == caplog.messages
        manager.restore(which)
        expected = (
            "going on from step 1: until the next save, a restart goes on from epoch=0-step=2.ckpt (step 2) again"
        )
        assert [expected] == caplog.messages
        save(manager, 0.3, start=2)
    caplog.clear()
    with opened(tmp_path, ALL) as manager:
        manager.restore()
        assert [] == caplog.messages
        newest, older = manager.session.state_dict(), {**manager.session.state_dict(), "step": 1}
    with opened(tmp_path, ALL) as manager:
        manager.session.load_state_dict(newest)
        assert [] == caplog.messages
        manager.session.load_state_dict(older)
        assert "going on from step 1: until the next save, a restart goes on from" in caplog.text
    caplog.clear()
    with contextlib.closing(CheckpointManager(tmp_path, ALL, format=PlainFormat())) as looking:
        looking.restore("best")
    assert [] == caplog.messages


# From the command line


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Four checkpoints, of which the newest and the best are gone."""
    folder = tmp_path / "run"
    policy = Policy(EverySteps(1), [KeepBest(2, "loss", mode="min"), KeepAll()], last="link", best="link")
    train(folder, 0.1, 0.2, 0.3, 0.4, policy=policy)
    for step in (10, 40):
        (folder / f"epoch={step // 10 - 1}-step={step}.ckpt").unlink()
    return folder


BY = ("--by", "loss", "--mode", "min")


def test_commands_name_no_file_that_is_gone(run: Path, tmp_path: Path) -> None:
    """It changes no path, list or average that scripts read; stderr names it."""
    assert f"{run}/epoch=2-step=30.ckpt\n" == command("last", run).out
    assert f"{run}/epoch=1-step=20.ckpt\n" == command("best", run, *BY).out
    said = command("ls", run)
    assert (0, True) == (said.code, "2 checkpoints" in said.out)
    assert (
        "payload gone, or of another size than its record says: epoch=0-step=10.ckpt, epoch=3-step=40.ckpt" in said.err
    )
    assert not any(name in said.out for name in ("step=10", "step=40", "last.ckpt"))
    assert [20, 30] == [item["step"] for item in command("ls", run, "--json").data]
    exported = command("export", run, "last", tmp_path / "last.pt")
    assert (0, True) == (exported.code, "epoch=3-step=40.ckpt (2 checkpoints, not counted)" in exported.err)
    averaged = command("average", run, "--best", "4", *BY, "-o", tmp_path / "mean.pt")
    assert "the run has 2 ranked checkpoints" in averaged.err
    policy = tmp_path / "policy.yaml"
    Policy(EverySteps(1), [KeepBest(1, "loss", mode="min"), KeepLast(1)]).to_yaml(policy)
    pruned = command("prune", run, "--policy", policy, "--json").data
    assert (["epoch=1-step=20.ckpt", "epoch=2-step=30.ckpt"], []) == ([*pruned["kept"]], [*pruned["going"]])


@pytest.mark.parametrize("name", ["epoch=3-step=40.ckpt", "epoch=3-step=40", "40"])
def test_asking_for_what_is_gone_is_an_error(run: Path, name: str) -> None:
    """By name or step; `verify` finds it, and says what is wrong with it."""
    said = command("show", run, name)
    assert (2, "") == (said.code, said.out)
    assert f"the payload of {name} is gone" in said.err
    said = command("verify", run, name)
    assert (1, True) == (said.code, "BAD   epoch=3-step=40.ckpt: is gone" in said.out)


def test_commands_on_a_directory_where_all_is_gone(run: Path) -> None:
    """There is no newest and no best."""
    for path in run.glob("epoch=*.ckpt"):
        path.unlink()
    for argv in (["last"], ["best", *BY]):
        said = command(argv[0], run, *argv[1:])
        assert (2, "") == (said.code, said.out)
        assert "(4 checkpoints, not counted)" in said.err
        assert "has no checkpoint that counts" in said.err
    said = command("ls", run)
    assert (0, True) == (said.code, "0 checkpoints" in said.out)
    assert "(4 checkpoints, not counted)" in said.err


def test_what_is_gone_is_not_copied(run: Path, tmp_path: Path) -> None:
    """The rest is, and the exit code says that it is not all."""
    said = command("copy", run, tmp_path / "copy")
    assert (1, True) == (said.code, "2 checkpoints copied" in said.out)
    assert [20, 30] == [item["step"] for item in command("ls", tmp_path / "copy", "--json").data]


def test_a_copy_brings_again_what_is_gone_there(tmp_path: Path) -> None:
    """A lost checkpoint is missing in the target; its record does not block the copy."""
    train(tmp_path / "run", 0.1, 0.2)
    command("copy", tmp_path / "run", tmp_path / "copy")
    (tmp_path / "copy/epoch=1-step=20.ckpt").unlink()
    said = command("copy", tmp_path / "run", tmp_path / "copy")
    assert (0, True) == (said.code, "1 checkpoint copied" in said.out)
    assert 0 == command("verify", tmp_path / "copy").code


@pytest.mark.parametrize("last", ["link", "copy"])
def test_a_copy_points_no_alias_of_another_run_elsewhere(tmp_path: Path, last: Any) -> None:
    """Nothing is replaced in the target: neither an alias of another run, nor a checkpoint in its place."""
    policy = Policy(EverySteps(1), [KeepBest(1, "loss", mode="min")], last=last)
    train(tmp_path / "theirs", 0.1, 0.2, policy=attrs.evolve(policy, name=Naming("theirs-{step}")))
    train(tmp_path / "ours", 0.1, policy=policy)
    before = snapshot(tmp_path / "theirs")
    said = command("copy", tmp_path / "ours", tmp_path / "theirs")
    assert 0 == said.code
    assert "last.ckpt was not copied" in said.err
    after = snapshot(tmp_path / "theirs")
    assert before == {path: after[path] for path in before}


def test_a_copy_that_is_made_again_lets_the_alias_follow(tmp_path: Path) -> None:
    """The target is a copy of this very run: its alias names what the source's names."""
    policy = Policy(EverySteps(1), [KeepLast(1)], last="link")
    train(tmp_path / "run", 0.1, policy=policy)
    command("copy", tmp_path / "run", tmp_path / "copy")
    with CheckpointManager(tmp_path / "run", policy, state=lambda: {"w": torch.zeros(2)}) as manager:
        manager.restore()
        manager.observe({}, step=20, epoch=1)
    said = command("copy", tmp_path / "run", tmp_path / "copy")
    assert (0, "") == (said.code, said.err.strip())
    assert "epoch=1-step=20.ckpt" == os.readlink(tmp_path / "copy/last.ckpt")
    assert 0 == command("copy", tmp_path / "run", tmp_path / "copy").code
