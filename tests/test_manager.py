"""The manager: what a loop sees when it observes, saves, attaches, rescues, pins and shares a directory."""

from __future__ import annotations

import copy
import errno
import json
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import yaml
from support.plain_format import PlainFormat

from checkpointer import (
    AnyOf,
    Attach,
    CheckpointerWarning,
    CheckpointManager,
    DistributedManager,
    EveryEpochs,
    EverySeconds,
    EverySteps,
    KeepBest,
    KeepLast,
    Listener,
    Naming,
    Policy,
    Record,
    Save,
    Skip,
)
from checkpointer.distributed.ranks import OneRank
from checkpointer.errors import (
    AliasInUseError,
    ClosedError,
    MetricError,
    NotEnoughSpaceError,
    NotFoundError,
    ObservationError,
    PolicyError,
    RecordError,
    SaveError,
)
from checkpointer.testing import FakeClock, MemoryStorage, die

BEST_AND_LAST = Policy(EverySteps(1), [KeepBest(2, "loss", mode="min"), KeepLast(1)])


def make(directory: Any = None, policy: Policy = BEST_AND_LAST, **kwargs: Any) -> CheckpointManager:
    """A manager whose payloads need no torch."""
    kwargs.setdefault("state", lambda: {"w": 1})
    return CheckpointManager(directory, policy, format=PlainFormat(), **kwargs)


def writing_manager(directory: Any, policy: Policy, kept: list[dict[str, Any]]) -> CheckpointManager:
    """A manager whose host keeps the manager's own state in the state that is saved."""

    def take() -> dict[str, Any]:
        kept.append(manager.session.state_dict())
        return {"w": 1}

    manager = make(directory, policy, state=take)
    return manager


def names(manager: CheckpointManager) -> list[str]:
    """Names of the run's checkpoints, without the extension."""
    return [record.name.removesuffix(".ckpt") for record in manager.records]


def payloads(storage: MemoryStorage) -> list[str]:
    """Every file that is not ours to keep books with."""
    return sorted(path for path in storage.list() if not path.startswith(".checkpointer"))


class FullStorage(MemoryStorage):
    """Has no room for a record while it is full."""

    is_full = False

    def write(self, path: str, data: bytes) -> None:
        """Write it if there is room."""
        if self.is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        super().write(path, data)


def report_late(manager: CheckpointManager) -> None:
    """Report what was measured of step 1 after it was saved."""
    manager.observe({"loss": 1.0}, step=1, epoch=0, epoch_end=False)
    manager.wait()


@pytest.mark.parametrize("background", [None, "wait"])
def test_late_metrics_that_cannot_be_written_are_a_failure_as_a_save_is(background: Any) -> None:
    """A failure is tolerated as often as was said, and then a SaveError; the checkpoint stays."""
    storage = FullStorage()
    with make(storage, background=background, tolerate_failures=1, policy=BEST_AND_LAST) as manager:
        manager.observe({}, step=1, epoch=0, epoch_end=False)
        manager.wait()
        storage.is_full = True
        with pytest.warns(CheckpointerWarning, match=r"did not get its new metrics .*; failure 1 of 1 tolerated"):
            report_late(manager)
        with pytest.raises(SaveError, match=r"did not get its new metrics .*No space left"):
            report_late(manager)
        storage.is_full = False
        report_late(manager)
        assert manager.last is not None
        assert {"loss": 1.0} == manager.last.metrics


def test_best_and_last_live_and_the_rest_is_retired() -> None:
    """After four steps the best two and the newest are there, in files as in records."""
    storage = MemoryStorage()
    manager = make(storage)
    for step, loss in enumerate([0.9, 0.4, 0.6, 0.7], start=1):
        assert manager.observe({"loss": loss}, step=step, epoch=0, epoch_end=False)
    assert ["epoch=0-step=2", "epoch=0-step=3", "epoch=0-step=4"] == names(manager)
    assert [f"epoch=0-step={n}.ckpt" for n in (2, 3, 4)] == payloads(storage)
    assert manager.best is not None
    assert 2 == manager.best.step
    assert manager.last is not None
    assert 4 == manager.last.step


def test_state_is_taken_once_per_save_and_never_when_not_due() -> None:
    """However many rules and aliases fire, the state callable runs once."""
    calls: list[int] = []
    policy = Policy(
        EverySteps(2),
        [KeepBest(1, "a", mode="min"), KeepBest(1, "b", mode="max"), KeepLast(2)],
        last="copy",
        best="link",
    )
    manager = make(policy=policy, state=lambda: calls.append(1) or {})  # type: ignore[func-returns-value]
    for step in range(1, 7):
        manager.observe({"a": 1.0, "b": 2.0}, step=step, epoch=0, epoch_end=False)
    assert 3 == len(calls)


def test_observation_that_is_not_due_says_when_the_next_is() -> None:
    """The fast path still explains itself."""
    manager = make(policy=Policy(EverySteps(100), [KeepLast(1)]))
    decision = manager.observe({}, step=1, epoch=0)
    assert isinstance(decision, Skip)
    assert "not due before step 100 (every 100 steps)" == decision.reason


def test_observing_a_saved_step_again_attaches_and_ranks() -> None:
    """Save before validation, rank after it: no second payload, and the loser goes."""
    calls: list[int] = []
    policy = Policy(EverySteps(10), [KeepBest(1, "val", mode="min"), KeepLast(1)])
    manager = make(policy=policy, state=lambda: calls.append(1) or {})  # type: ignore[func-returns-value]
    for step, val in ((10, 0.5), (20, 0.1), (30, 0.3)):
        assert isinstance(manager.observe({}, step=step, epoch=0), Save)
        decision = manager.observe({"val": val}, step=step, epoch=0)
        assert isinstance(decision, Attach)
        assert not decision
    assert 3 == len(calls)
    assert ["epoch=0-step=20", "epoch=0-step=30"] == names(manager)
    assert {"val": 0.3} == manager.records[-1].metrics


def test_late_metric_of_an_older_saved_step_is_attached() -> None:
    """An asynchronous validation may report after training went on."""
    policy = Policy(EverySteps(10), [KeepBest(1, "val", mode="min"), KeepLast(5)])
    manager = make(policy=policy)
    for step in (10, 20):
        manager.observe({}, step=step, epoch=0)
    assert isinstance(manager.observe({"val": 0.5}, step=10, epoch=0), Attach)
    assert manager.best is not None
    assert 10 == manager.best.step


def test_step_that_goes_back_is_an_error() -> None:
    """A loop restarted without restore() would save nothing for hours."""
    manager = make()
    manager.observe({}, step=9, epoch=0)
    with pytest.raises(ObservationError, match=r"went back from 9 to 1; .*restore\(\)"):
        manager.observe({}, step=1, epoch=0)


def test_epoch_that_ends_twice_is_an_error_that_says_what_to_pass() -> None:
    """Per-step calls under an epoch trigger must say where epochs end."""
    manager = make(policy=Policy(EveryEpochs(5), [KeepLast(1)]))
    manager.observe({}, step=1, epoch=0)
    with pytest.raises(ObservationError, match="epoch 0 ended at step 1 and again at step 2; pass epoch_end=True"):
        manager.observe({}, step=2, epoch=0)


def test_a_loop_without_epochs_names_none() -> None:
    """The epoch is then the one in progress, also after a restart, and only an end that is stated counts."""
    storage, policy = MemoryStorage(), Policy(AnyOf(EverySteps(10), EveryEpochs(1)), [KeepLast(9)])
    with make(storage, policy) as manager:
        saved = [step for step in range(1, 12) if manager.observe({}, step)]
        assert [10] == saved
        assert manager.observe({}, 12, epoch_end=True)
        assert not manager.observe({"loss": 1.0}, 12), "the same step again is of the same epoch"
        assert [(0, False), (0, True)] == [(record.epoch, record.epoch_end) for record in manager.records]
    with make(storage, policy) as manager:
        manager.restore()
        assert manager.observe({}, 20)
        assert manager.observe({}, 21, 4, epoch_end=True)
        assert manager.observe({}, 30)
        assert [1, 4, 5] == [record.epoch for record in manager.records[-3:]]


def test_every_rank_takes_the_same_epoch_for_a_report_that_names_none() -> None:
    """The ranks count reports that rank 0's manager does not see."""
    policy = Policy(EverySteps(10), [KeepLast(9)])
    with DistributedManager(None, policy, ranks=OneRank(), state=dict, format=PlainFormat()) as manager:
        for step in range(1, 21):
            manager.observe({}, step, epoch_end=step == 15)
        assert manager.manager is not None
        assert [0, 1] == [record.epoch for record in manager.manager.records]


def test_bad_metric_names_itself() -> None:
    """A string or vector is refused when something is due, naming metric, value and type."""
    manager = make()
    with pytest.raises(MetricError, match=r"metric 'loss' is 'low' \(str\)"):
        manager.observe({"loss": "low"}, step=1, epoch=0)


def test_unreported_metric_warns_once_with_the_names_reported() -> None:
    """A typo in a rule is reported at the first due observation."""
    manager = make(policy=Policy(EverySteps(1), [KeepBest(1, "val_los", mode="min"), KeepLast(1)]))
    with pytest.warns(CheckpointerWarning, match=r"'val_los' was not reported at step 1 \(have: val_loss\)"):
        manager.observe({"val_loss": 1.0}, step=1, epoch=0)
    manager.observe({"val_loss": 1.0}, step=2, epoch=0)


def test_due_point_waits_for_the_metric_and_is_of_that_step() -> None:
    """If only ranked rules would save, the next observation that has the metric does."""
    manager = make(policy=Policy(EverySteps(10), [KeepBest(1, "val", mode="min")]))
    decision = manager.observe({}, step=10, epoch=0)
    assert isinstance(decision, Skip)
    assert decision.waiting
    assert not manager.observe({}, step=11, epoch=0)
    assert manager.observe({"val": 0.1}, step=13, epoch=0)
    assert not manager.observe({"val": 0.05}, step=14, epoch=0)
    assert [13] == [record.step for record in manager.records]


def test_time_trigger_survives_restarts_without_a_checkpoint(tmp_path: Path) -> None:
    """Three runs of 0.7 s under an interval of 1 s do save."""
    clock = FakeClock(1000.0)
    policy = Policy(EverySeconds(1), [KeepLast(1)])
    saves = 0
    for start in (1, 11, 21):
        manager = make(tmp_path, policy, clock=clock)
        manager.restore()
        for tenth in range(7):
            clock.advance(0.1)
            saves += bool(manager.observe({}, step=start + tenth, epoch=0))
        die(manager._owner)
        del manager
    assert saves >= 1


def test_clock_that_went_back_while_down_saves_at_once(tmp_path: Path) -> None:
    """A record from the future must not stop the time trigger."""
    policy = Policy(EverySeconds(60), [KeepLast(1)])
    clock = FakeClock(10_000.0)
    with make(tmp_path, policy, clock=clock) as manager:
        clock.advance(61)
        assert manager.observe({}, step=1, epoch=0)
    with make(tmp_path, policy, clock=FakeClock(500.0)) as manager:
        manager.restore()
        assert manager.observe({}, step=2, epoch=0)


def test_last_link_is_relative_and_follows_the_newest(tmp_path: Path) -> None:
    """A moved folder keeps its last."""
    policy = Policy(EverySteps(1), [KeepBest(1, "loss", mode="min")], last="link")
    with make(tmp_path / "a", policy) as manager:
        for step, loss in enumerate([0.1, 0.5, 0.9], start=1):
            manager.observe({"loss": loss}, step=step, epoch=0)
    (tmp_path / "a").rename(tmp_path / "b")
    assert "epoch=0-step=3.ckpt" == str((tmp_path / "b/last.ckpt").readlink())
    with make(tmp_path / "b", policy) as manager:
        restored = manager.restore("last")
        assert restored is not None
        assert 3 == restored.step
        assert manager.best is not None
        assert 1 == manager.best.step


def test_last_copy_is_one_file_with_the_payload_or_a_slot(tmp_path: Path) -> None:
    """A kept payload is hard-linked; one that no rule keeps is written under the alias itself."""
    policy = Policy(EverySteps(1), [KeepBest(1, "loss", mode="min")], last="copy")
    with make(tmp_path, policy) as manager:
        manager.observe({"loss": 0.5}, step=1, epoch=0)
        assert (tmp_path / "last.ckpt").samefile(tmp_path / "epoch=0-step=1.ckpt")
        manager.observe({"loss": 0.9}, step=2, epoch=0)
        assert {"epoch=0-step=1.ckpt", "last.ckpt"} == {p.name for p in tmp_path.glob("*.ckpt")}
        assert manager.last is not None
        assert ("last.ckpt", 2) == (manager.last.name, manager.last.step)
        manager.observe({"loss": 0.1}, step=3, epoch=0)
        assert (tmp_path / "last.ckpt").samefile(tmp_path / "epoch=0-step=3.ckpt")
    assert ["epoch=0-step=3"] == names(manager)


@pytest.mark.parametrize("last", ["link", "copy"])
def test_last_names_a_rescue_until_the_next_regular_save(tmp_path: Path, last: Any) -> None:
    """A slot, which only the alias named, gets a name of its own first: the rescue may be of a step half done."""
    policy = Policy(EverySteps(1), [KeepBest(1, "loss", mode="min")], last=last)
    step = 0
    manager = make(tmp_path, policy, state=lambda: {"step": step})
    for step, loss in enumerate([0.1, 0.2], start=1):
        manager.observe({"loss": loss}, step=step, epoch=0)
    step = 3
    manager.rescue("asked for", step=3, epoch=0)
    assert (tmp_path / "last.ckpt").read_bytes() == (tmp_path / "rescue-step=3.ckpt").read_bytes()
    assert [1, 2, 3] == [record.step for record in manager.records]
    manager.observe({"loss": 0.3}, step=4, epoch=0)
    assert [1, 4] == [record.step for record in manager.records]
    manager.close()


def test_foreign_last_is_left_alone(tmp_path: Path) -> None:
    """A file we did not write keeps its name; ours takes the next one, and says so."""
    (tmp_path / "last.ckpt").write_bytes(b"theirs")
    policy = Policy(EverySteps(1), [KeepLast(1)], last="link")
    with pytest.warns(CheckpointerWarning, match=r"last\.ckpt is not this run's; the alias is last-v1\.ckpt"):
        manager = make(tmp_path, policy)
    manager.observe({}, step=1, epoch=0)
    assert b"theirs" == (tmp_path / "last.ckpt").read_bytes()
    assert (tmp_path / "last-v1.ckpt").is_symlink()
    manager.close()


def test_same_alias_twice_is_an_error(tmp_path: Path) -> None:
    """Two live managers in one directory must not fight over last."""
    policy = Policy(EverySteps(1), [KeepLast(1)], last="link")
    first = make(tmp_path, policy)
    second = make(tmp_path, policy)
    first.observe({}, step=1, epoch=0)
    with pytest.raises(AliasInUseError, match=r"the alias 'last.ckpt'.* is kept by another live manager"):
        second.observe({}, step=1, epoch=0)
    with pytest.raises(AliasInUseError, match="stop one of them"):
        make(tmp_path, policy, label="b")
    second.close()
    other = make(tmp_path, Policy(EverySteps(1), [KeepLast(1)], name=Naming(last="last-b"), last="link"), label="b")
    other.close()
    first.close()
    make(tmp_path, policy).close()


def test_two_runs_in_one_directory_never_touch_each_other(tmp_path: Path) -> None:
    """A new run warns that others are there, and retires only its own."""
    with make(tmp_path, Policy(EverySteps(1), [KeepLast(2)])) as manager:
        for step in (1, 2):
            manager.observe({}, step=step, epoch=0)
    with make(tmp_path, Policy(EverySteps(1), [KeepLast(1)])) as manager:
        with pytest.warns(CheckpointerWarning, match="holds 2 checkpoints of other runs; they are left alone"):
            manager.observe({}, step=1, epoch=0)
        manager.observe({}, step=2, epoch=0)
        assert ["epoch=0-step=2-v1"] == names(manager)
    assert 3 == len(list(tmp_path.glob("*.ckpt")))


def test_pinned_checkpoint_is_never_retired_until_unpinned() -> None:
    """A pin survives rules and restarts."""
    storage = MemoryStorage()
    policy = Policy(EverySteps(1), [KeepLast(1)])
    manager = make(storage, policy)
    manager.observe({}, step=1, epoch=0)
    manager.pin("epoch=0-step=1.ckpt")
    manager.close()
    manager = make(storage, policy)
    manager.restore()
    manager.observe({}, step=2, epoch=0)
    manager.observe({}, step=3, epoch=0)
    assert ["epoch=0-step=1", "epoch=0-step=3"] == names(manager)
    manager.unpin("epoch=0-step=1.ckpt")
    manager.observe({}, step=4, epoch=0)
    assert ["epoch=0-step=4"] == names(manager)
    with pytest.raises(NotFoundError, match=r"no checkpoint 'nope' \(have: epoch=0-step=4.ckpt\)"):
        manager.pin("nope")


def test_exception_in_the_with_block_rescues_and_propagates() -> None:
    """The rescue has its own name, is not ranked, counts as newest, and goes with the next regular save."""
    storage = MemoryStorage()
    policy = Policy(EverySteps(10), [KeepBest(1, "loss", mode="min")])

    def train() -> None:
        with make(storage, policy) as manager:
            manager.observe({"loss": 0.5}, step=10, epoch=0)
            manager.observe({"loss": 0.1}, step=13, epoch=0)
            raise ZeroDivisionError("in the model")

    with pytest.raises(ZeroDivisionError, match="in the model"):
        train()
    manager = make(storage, policy)
    restored = manager.restore()
    assert restored is not None
    assert ("rescue-step=13.ckpt", 13) == (restored.record.name, restored.step)
    assert "rescue: ZeroDivisionError: in the model" == restored.record.reason
    assert manager.best is not None
    assert 10 == manager.best.step
    manager.observe({"loss": 0.2}, step=20, epoch=0)
    assert ["epoch=0-step=20"] == names(manager)


def test_rescue_of_a_saved_step_writes_nothing() -> None:
    """The regular checkpoint of that step is the state."""
    manager = make()
    manager.observe({}, step=1, epoch=0)
    decision = manager.rescue("SIGTERM")
    assert isinstance(decision, Skip)
    assert "step 1 is saved already as epoch=0-step=1.ckpt" == decision.reason


def test_rescue_happens_despite_a_bad_metric_in_the_last_report() -> None:
    """Metrics are not looked at while nothing is due; a bad one must not cost the rescue."""
    manager = make(policy=Policy(EverySteps(100), [KeepLast(1)]))
    manager.observe({"loss": "oops"}, step=5, epoch=0)
    assert manager.rescue("Ctrl-C")


def test_failed_save_raises_and_older_checkpoints_stay() -> None:
    """Nothing is retired for a checkpoint that was not written."""

    class Broken(MemoryStorage):
        broken = False

        def upload(self, path: str) -> Any:
            if self.broken:
                raise OSError(28, "No space left on device")
            return super().upload(path)

    storage = Broken()
    manager = make(storage, Policy(EverySteps(1), [KeepLast(1)]))
    manager.observe({}, step=1, epoch=0)
    storage.broken = True
    with pytest.raises(SaveError, match=r"step=2.ckpt was not saved \(OSError: .*No space left.*untouched"):
        manager.observe({}, step=2, epoch=0)
    assert ["epoch=0-step=1"] == names(manager)
    storage.broken = False
    assert manager.observe({}, step=3, epoch=0)


def test_tolerated_failures_warn_and_then_raise() -> None:
    """tolerate_failures=1: one warning, then the error; a success in between resets the count."""
    fail = [True, False, True, True]

    class Flaky(PlainFormat):
        def write(self, state: Any, stream: Any) -> None:
            if fail.pop(0):
                raise OSError(5, "Input/output error")
            super().write(state, stream)

    manager = CheckpointManager(None, BEST_AND_LAST, state=dict, format=Flaky(), tolerate_failures=1)
    with pytest.warns(CheckpointerWarning, match="failure 1 of 1 tolerated"):
        assert not manager.observe({}, step=1, epoch=0)
    assert manager.observe({}, step=2, epoch=0)
    with pytest.warns(CheckpointerWarning, match="failure 1 of 1 tolerated"):
        manager.observe({}, step=3, epoch=0)
    with pytest.raises(SaveError, match="Input/output error"):
        manager.observe({}, step=4, epoch=0)


def test_shortage_of_space_is_said_before_anything_is_written() -> None:
    """The last checkpoint's size is the measure."""

    class Full(MemoryStorage):
        def free_space(self) -> int | None:
            return 1 if self.list() else None

    storage = Full()
    manager = make(storage)
    manager.observe({}, step=1, epoch=0)
    before = payloads(storage)
    with pytest.raises(NotEnoughSpaceError, match=r"1 B free, and the last checkpoint took 8 B; nothing was written"):
        manager.observe({}, step=2, epoch=0)
    assert before == payloads(storage)


def test_failing_delete_warns_and_is_retried() -> None:
    """A retired checkpoint whose payload cannot be deleted does not count, and is deleted later."""

    class Stuck(MemoryStorage):
        stuck = True

        def delete(self, path: str) -> None:
            if self.stuck and path.endswith(".ckpt"):
                raise PermissionError(13, "Permission denied")
            super().delete(path)

    storage = Stuck()
    manager = make(storage, Policy(EverySteps(1), [KeepLast(1)]))
    manager.observe({}, step=1, epoch=0)
    with pytest.warns(CheckpointerWarning, match=r"step=1.ckpt could not be deleted .*tries again"):
        manager.observe({}, step=2, epoch=0)
    assert ["epoch=0-step=2"] == names(manager)
    storage.stuck = False
    manager.observe({}, step=3, epoch=0)
    assert ["epoch=0-step=3.ckpt"] == payloads(storage)


def test_listeners_are_called_after_durability_and_may_fail() -> None:
    """on_saved sees the payload in place, on_retired its absence; a broken one only warns."""
    storage = MemoryStorage()
    events: list[tuple[str, int, bool]] = []

    class Recorder(Listener):
        def on_saved(self, record: Record) -> None:
            events.append(("saved", record.step, record.name in storage.list()))

        def on_retired(self, record: Record) -> None:
            events.append(("retired", record.step, record.name in storage.list()))
            raise ValueError("tracker down")

    manager = make(storage, Policy(EverySteps(1), [KeepLast(1)]), listeners=[Recorder()])
    manager.observe({}, step=1, epoch=0)
    with pytest.warns(CheckpointerWarning, match=r"Recorder.on_retired failed .*tracker down.*the checkpoint is fine"):
        manager.observe({}, step=2, epoch=0)
    assert [("saved", 1, True), ("retired", 1, False), ("saved", 2, True)] == events


def test_trainer_owned_writing_gets_a_staged_path(tmp_path: Path) -> None:
    """save= never sees the name of an existing checkpoint, and a folder is fine."""
    paths: list[str] = []

    def save(path: str) -> None:
        paths.append(path)
        Path(path).mkdir()
        Path(path, "weights.bin").write_bytes(b"w" * 100)

    manager = CheckpointManager(tmp_path, BEST_AND_LAST, save=save)
    decision = manager.observe({}, step=1, epoch=0)
    assert isinstance(decision, Save)
    assert b"w" * 100 == (tmp_path / decision.name / "weights.bin").read_bytes()
    assert ".checkpointer/staging" in paths[0]
    assert 100 == manager.records[0].size
    manager.close()


def test_a_trainer_may_choose_a_format_by_the_end_of_its_path(tmp_path: Path) -> None:
    """The staged path ends with the final name, all its suffixes included, as keras wants it."""
    seen = []

    def save(path: str) -> None:
        assert path.endswith((".weights.h5", ".keras")), path
        seen.append(os.path.basename(path))
        Path(path).write_text("x")

    for name in ("{epoch}.weights.h5", "{epoch}.keras"):
        policy = Policy(EverySteps(1), [KeepLast(1)], name=name, last="copy")
        with CheckpointManager(tmp_path / name[-4:], policy, save=save) as manager:
            manager.observe({}, step=1, epoch=0)
            manager.observe({}, step=2, epoch=1)
    assert ["epoch=0.weights.h5", "epoch=1.weights.h5", "epoch=0.keras", "epoch=1.keras"] == [
        name.partition("-")[2] for name in seen
    ]


def test_commit_adopts_what_a_trainer_wrote_in_place(tmp_path: Path) -> None:
    """decide/commit for trainers that own the moment: the record takes the trainer's name."""
    manager = CheckpointManager(tmp_path, Policy(EverySteps(10), [KeepLast(1)]), state=dict)
    for step in (10, 20):
        decision = manager.session.decide({"loss": 0.1}, step=step, epoch=0)
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.bin").write_bytes(b"m")
        manager.session.commit(decision, folder)
    assert ["checkpoint-20"] == [record.name for record in manager.records]
    assert not (tmp_path / "checkpoint-10").exists()
    with pytest.raises(SaveError, match=r"is not in .*; let the trainer write inside the manager's directory"):
        manager.session.commit(manager.session.decide({}, step=30, epoch=0), tmp_path.parent)
    manager.close()


def test_commit_makes_the_rescue_of_a_step_its_regular_checkpoint(tmp_path: Path) -> None:
    """Without another write; a checkpoint that is regular already, or of another step, keeps its name."""
    policy = Policy(EverySteps(10), [KeepBest(1, "loss", mode="min")])
    manager = CheckpointManager(tmp_path, policy, state=lambda: {"weights": 1})
    decision = manager.session.decide({}, step=10, epoch=0)
    assert not decision
    rescued = manager.rescue("signal 15", step=10, epoch=0)
    assert isinstance(rescued, Save)
    regular = manager.session.decide({"loss": 0.1}, step=10, epoch=0)
    assert isinstance(regular, Save)
    manager.session.commit(attrs.evolve(regular, retire=()), tmp_path / rescued.name)
    assert [(rescued.name, "regular", {"loss": 0.1})] == [(r.name, r.kind, dict(r.metrics)) for r in manager.records]
    with pytest.raises(SaveError, match="is the name of a checkpoint or alias already"):
        manager.session.commit(manager.session.decide({"loss": 0.0}, step=20, epoch=1), tmp_path / rescued.name)
    manager.close()


def test_a_state_taken_while_saving_is_that_after_the_save(tmp_path: Path) -> None:
    """A host that keeps it in the very file goes on where the file ends: its first step owes nothing."""
    kept: list[dict[str, Any]] = []
    policy = Policy(EverySteps(10), [KeepLast(2)], name="{step}")
    with writing_manager(tmp_path, policy, kept) as manager:
        manager.observe({}, step=10, epoch=0, epoch_end=False)
    with make(tmp_path, policy) as manager:
        manager.session.load_state_dict(kept[0])
        assert not manager.observe({}, step=11, epoch=0, epoch_end=False)
        assert manager.observe({}, step=20, epoch=0, epoch_end=False)


def test_the_source_of_a_resumed_state_is_kept(tmp_path: Path) -> None:
    """A host whose user chose the checkpoint says so: it is kept as one restored by name is."""
    policy = Policy(EverySteps(1), [KeepLast(1)], name="{step}")
    with make(tmp_path, policy) as manager:
        manager.observe({}, step=1, epoch=0)
        saved = manager.session.state_dict()
    with make(tmp_path, policy) as manager:
        manager.session.load_state_dict(saved, source="step=1.ckpt")
        manager.observe({}, step=2, epoch=1)
        manager.observe({}, step=3, epoch=2)
        assert ["step=1", "step=3"] == names(manager)


def test_an_end_of_epoch_at_a_saved_step_is_not_made_up_for_later() -> None:
    """The step trigger was first; what the end adds is attached, and the next step owes nothing, resumed or not."""
    storage = MemoryStorage()
    policy = Policy(AnyOf(EveryEpochs(1), EverySteps(4)), [KeepLast(9)])
    kept: list[dict[str, Any]] = []
    with writing_manager(storage, policy, kept) as manager:
        manager.observe({}, step=4, epoch=0, epoch_end=False)
        assert "attached the end of its epoch" in manager.observe({}, step=4, epoch=0, epoch_end=True).reason
        assert manager.records[0].epoch_end
        assert not manager.observe({}, step=5, epoch=1, epoch_end=False)
    with make(storage, policy) as manager:
        manager.session.load_state_dict(kept[0])
        assert not manager.observe({}, step=5, epoch=1, epoch_end=False)


def test_a_host_may_say_why_it_is_due() -> None:
    """At the end of a training the trigger is not asked; the rules are."""
    manager = make(policy=Policy(EverySteps(100), [KeepBest(1, "loss", mode="min")]))
    decision = manager.session.decide({"loss": 1.0}, step=7, epoch=0, epoch_end=False, due="the training ends")
    assert isinstance(decision, Save)
    assert "the training ends; kept: the best by loss (min)" == decision.reason
    manager.session.commit(decision)
    assert not manager.session.decide({"loss": 2.0}, step=8, epoch=0, epoch_end=False, due="the training ends")


def test_what_a_decision_leads_to_can_be_seen_before() -> None:
    """The manifest as it will be, the saved one in and the retired one out."""
    manager = make(policy=Policy(EverySteps(1), [KeepLast(1)], name="{step}"))
    manager.observe({}, step=1, epoch=0)
    decision = manager.session.decide({}, step=2, epoch=1)
    assert ["step=2.ckpt"] == [record.name for record in manager.session.after(decision).history]
    assert ["step=1"] == names(manager)
    manager.session.commit(decision)
    assert ["step=2"] == names(manager)
    assert manager.session.manifest == manager.session.after(manager.session.decide({}, step=2, epoch=1))


def test_below_the_horizon_nothing_is_due() -> None:
    """Processes that report together can be silent together."""
    manager = make(policy=Policy(EverySteps(10), [KeepBest(1, "loss", mode="min")]))
    assert 10 == manager.session.horizon.step
    manager.observe({}, step=10, epoch=0, epoch_end=False)
    assert not manager.session.horizon.covers(11, 0, epoch_end=False), "a due point waits for its metric"
    manager.observe({"loss": 1.0}, step=12, epoch=0, epoch_end=False)
    assert 20 == manager.session.horizon.step


def test_state_dict_carries_primitives_and_resumes_the_run(tmp_path: Path) -> None:
    """A host's resume is a restore: same run, later records abandoned, triggers go on."""
    policy = Policy(EverySteps(10), [KeepLast(5)])
    with make(tmp_path, policy) as manager:
        manager.observe({}, step=10, epoch=0)
        saved = json.loads(json.dumps(manager.session.state_dict()))
        manager.observe({}, step=20, epoch=0)
    with make(tmp_path, policy) as manager:
        manager.session.load_state_dict(saved)
        assert [10] == [record.step for record in manager.records]
        assert [20] == [record.step for record in manager.session.manifest.abandoned]
        assert not manager.observe({}, step=15, epoch=0)
        assert manager.observe({}, step=20, epoch=0)
        with pytest.raises(RecordError, match="expected what state_dict"):
            manager.session.load_state_dict({"run": "x"})


def test_to_yaml_writes_paths_and_scores(tmp_path: Path) -> None:
    """Best first, by full path, in best_k_models.yaml unless another path is given."""
    with make(tmp_path, Policy(EverySteps(1), [KeepBest(2, "loss", mode="min")])) as manager:
        for step, loss in enumerate([0.9, 0.4, 0.6], start=1):
            manager.observe({"loss": loss}, step=step, epoch=0)
        scores = manager.to_yaml()
    assert {str(tmp_path / "epoch=0-step=2.ckpt"): 0.4, str(tmp_path / "epoch=0-step=3.ckpt"): 0.6} == scores
    assert scores == yaml.safe_load((tmp_path / "best_k_models.yaml").read_text())


def test_closed_manager_says_so() -> None:
    """Every method but close and the properties."""
    manager = make()
    manager.close()
    manager.close()
    with pytest.raises(ClosedError, match="the manager is closed"):
        manager.observe({}, step=1, epoch=0)
    with pytest.raises(ClosedError, match="the manager is closed"):
        manager.restore()


def test_weights_only_contents_say_so_once_and_are_skipped_by_a_resume() -> None:
    """contents='weights' cannot resume a run."""
    storage = MemoryStorage()
    policy = Policy(EverySteps(1), [KeepLast(1)], contents="weights")
    with pytest.warns(CheckpointerWarning, match="cannot resume a run"):
        manager = make(storage, policy, state=lambda: {"all": 1}, weights=lambda: {"w": 2})
    manager.observe({}, step=1, epoch=0)
    restored = manager.restore(contents="any")
    assert restored is not None
    assert {"w": 2} == restored.state


def test_state_and_save_together_are_refused() -> None:
    """One of them takes the state."""
    with pytest.raises(PolicyError, match="both save= and state="):
        CheckpointManager(None, BEST_AND_LAST, state=dict, save=print)


@pytest.mark.parametrize("state", [{"w": 1}, torch.nn.Linear(1, 1)], ids=["a dict", "a module"])
def test_a_state_that_is_no_function_is_refused_at_once(state: Any) -> None:
    """The state itself, or the module: both would fail at the first save with an error of Python's own."""
    for make_one in (CheckpointManager, DistributedManager):
        with pytest.raises(PolicyError, match=r"state= is of type (dict|Linear); expected a function .*state=lambda"):
            make_one(None, BEST_AND_LAST, state=state)


def test_verbose_logs_the_plan_and_each_decision(caplog: pytest.LogCaptureFixture) -> None:
    """One line at the start, one per decision."""
    with caplog.at_level(logging.INFO, logger="checkpointer"):
        manager = make(policy=Policy(AnyOf(EverySteps(5), EveryEpochs(1)), [KeepLast(1)]), verbose=True)
        manager.observe({}, step=5, epoch=0)
    assert "memory: save every 5 steps or every epoch; keep the newest" == caplog.messages[0]
    assert (
        "step 5: step 5 reached a multiple of 5; 1 epoch finished, every epoch; kept: the newest" == caplog.messages[1]
    )


def test_the_plan_says_that_last_saves_every_due_point(caplog: pytest.LogCaptureFixture) -> None:
    """With ``last=`` a step is saved even if no rule keeps it, which the rules do not show."""
    with caplog.at_level(logging.INFO, logger="checkpointer"):
        make(policy=Policy(EverySteps(5), [KeepLast(1)], last="copy"))
    plan = "last.ckpt is a copy of the newest checkpoint, so every due checkpoint is saved, even if no rule keeps it"
    assert f"memory: save every 5 steps; keep the newest; {plan}" == caplog.messages[0]


def test_the_facade_has_these_names_and_no_others() -> None:
    """The session has the names that only adapters need."""
    actions = {"observe", "restore", "rescue", "pin", "unpin", "wait", "close", "location", "to_yaml"}
    values = {"policy", "records", "best", "last", "session"}
    assert actions | values == {name for name in dir(make()) if not name.startswith("_")}


def test_fixed_name_is_replaced_with_the_counter_off(tmp_path: Path) -> None:
    """Old or new, never neither, and never a second file."""
    policy = Policy(EverySteps(1), [KeepLast(1)], name=Naming("model", version_counter=False))
    with make(tmp_path, policy) as manager:
        for step in (1, 2, 3):
            assert manager.observe({}, step=step, epoch=0)
    assert ["model.ckpt"] == [path.name for path in tmp_path.glob("*.ckpt")]
    assert [3] == [record.step for record in manager.records]


def test_pinned_slot_gets_a_name_of_its_own() -> None:
    """The last slot is overwritten by the next save; a pin keeps its state."""
    storage = MemoryStorage()
    policy = Policy(EverySteps(1), [KeepBest(1, "loss", mode="min")], last="copy")
    manager = make(storage, policy)
    manager.observe({"loss": 0.1}, step=1, epoch=0)
    manager.observe({"loss": 0.5}, step=2, epoch=0)
    manager.pin("last.ckpt")
    manager.observe({"loss": 0.6}, step=3, epoch=0)
    assert ["epoch=0-step=1", "epoch=0-step=2", "last"] == names(manager)
    assert ["epoch=0-step=1.ckpt", "epoch=0-step=2.ckpt", "last.ckpt"] == payloads(storage)


def test_records_and_decisions_can_be_copied_and_pickled() -> None:
    """Ranks broadcast decisions."""
    manager = make()
    decision = manager.observe({"loss": float("nan")}, step=1, epoch=0)
    assert repr(decision) == repr(copy.deepcopy(decision)) == repr(pickle.loads(pickle.dumps(decision)))
    assert manager.records == pickle.loads(pickle.dumps(manager.records))


def test_to_yaml_lists_only_the_best_k() -> None:
    """A checkpoint that is kept only as the last is not listed."""
    manager = make()
    for step, loss in enumerate([0.1, 0.2, 0.9], start=1):
        manager.observe({"loss": loss}, step=step, epoch=0)
    assert [0.1, 0.2] == list(manager.to_yaml().values())
