"""The law of reports: the step in a record is the step whose state it holds, whatever was refused before."""

from __future__ import annotations

import contextlib
import json
import warnings
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from support.plain_format import PlainFormat
from support.sampling import EVERY

from checkpointer import (
    AnyOf,
    CheckpointerWarning,
    CheckpointManager,
    EveryEpochs,
    EverySteps,
    KeepAll,
    KeepBest,
    KeepLast,
    Naming,
    Policy,
    Record,
)
from checkpointer.distributed.manager import DistributedManager
from checkpointer.distributed.ranks import OneRank
from checkpointer.errors import CheckpointerError, ObservationError
from checkpointer.testing import MemoryStorage, die

POLICIES = {
    "every step": Policy(EverySteps(1), [KeepAll()]),
    "some steps": Policy(EverySteps(3), [KeepBest(2, "loss", mode="min"), KeepLast(2)]),
    "epochs": Policy(AnyOf(EveryEpochs(1), EverySteps(4)), [KeepLast(3)], last="copy"),
    "a name that cannot be made": Policy(EverySteps(3), [KeepAll()], name=Naming("{epoch}-{step}-{accuracy:.2f}")),
    "saves nothing by itself": Policy(EverySteps(1000), [KeepLast(1)]),
}
BAD_METRICS = st.sampled_from([{"loss": "oops"}, {"loss": None}, {"": 1.0}, None])
BAD_STEPS = st.sampled_from([-1, 1.5, "7", None])


class DiskThatFails(MemoryStorage):
    """Fails each write while ``is_full`` is set."""

    is_full = False

    def upload(self, path: str) -> Any:
        """Begin a write, unless the disk is full."""
        if self.is_full:
            raise OSError(28, "No space left on device")
        return super().upload(path)


class Reports(RuleBasedStateMachine):
    """A training whose reports are sometimes refused, and which is ended and started again at any moment.

    The loop trains and then reports, as loops do: the model knows the step and the epoch of each state.
    """

    def __init__(self) -> None:
        super().__init__()
        self.storage = DiskThatFails()
        self.place = {"step": 0, "epoch": 0}
        self.start_step = 0
        self.manager: CheckpointManager | DistributedManager

    @initialize(kind=st.sampled_from(["manager", "background", "ranked"]), policy=st.sampled_from(sorted(POLICIES)))
    def begin(self, kind: str, policy: str) -> None:
        """Choose a policy and a kind of manager."""
        self.kind, self.policy = kind, POLICIES[policy]
        self.open()

    def open(self) -> None:
        """Start a process, and restore what there is."""
        options: dict[str, Any] = {"state": lambda: dict(self.place), "format": PlainFormat()}
        if self.kind == "ranked":
            self.manager = DistributedManager(self.storage, self.policy, ranks=OneRank(), **options)
        else:
            self.manager = CheckpointManager(
                self.storage, self.policy, background="wait" if self.kind == "background" else None, **options
            )
        restored = self.manager.restore()
        self.place = {"step": 0, "epoch": 0} if restored is None else dict(restored.state)
        self.start_step = self.place["step"]
        if restored is not None:
            assert (restored.record.step, restored.record.epoch) == (self.place["step"], self.place["epoch"])

    @property
    def core(self) -> CheckpointManager:
        """The manager that decides."""
        manager = self.manager if isinstance(self.manager, CheckpointManager) else self.manager.manager
        assert manager is not None
        return manager

    def report(self, metrics: Any, **changed: Any) -> None:
        """Report; a refusal is what a loop may get."""
        arguments = {**self.place, "epoch_end": False, **changed}
        try:
            self.manager.observe(metrics, **arguments)
        except (CheckpointerError, TypeError, AttributeError):
            return

    @rule(steps=st.integers(0, 3), next_epoch=st.booleans(), epoch_end=st.sampled_from([None, False, True]))
    def train_and_report(self, steps: int, next_epoch: bool, epoch_end: bool | None) -> None:
        """Report what is true; an epoch that ends twice is refused all the same."""
        self.place = {"step": self.place["step"] + steps, "epoch": self.place["epoch"] + next_epoch}
        self.report({"loss": float(self.place["step"] % 5)}, epoch_end=epoch_end)

    @rule(steps=st.integers(0, 3), metrics=BAD_METRICS)
    def train_and_report_bad_metrics(self, steps: int, metrics: Any) -> None:
        """The step is right, and the metrics are refused or never looked at."""
        self.place = {**self.place, "step": self.place["step"] + steps}
        self.report(metrics)

    @rule(steps=st.integers(1, 3))
    def train_and_report_to_a_full_disk(self, steps: int) -> None:
        """A save that is due fails, in the loop or behind it."""
        self.core.wait()
        self.storage.is_full = True
        self.place = {**self.place, "step": self.place["step"] + steps}
        self.report({"loss": 0.0})
        try:
            self.core.wait()
        except CheckpointerError:
            pass
        finally:
            self.storage.is_full = False

    @rule(back=st.integers(1, 6), epoch_end=st.sampled_from([None, False]))
    def report_an_older_step(self, back: int, epoch_end: bool | None) -> None:
        """Late metrics of a step that is saved, or a loop that counts wrong."""
        step = max(0, self.place["step"] - back)
        if step != self.place["step"]:
            self.report({"loss": 0.5}, step=step, epoch_end=epoch_end)

    @rule(step=BAD_STEPS)
    def report_what_is_no_step(self, step: Any) -> None:
        """The step is not a whole number of at least 0."""
        self.report({"loss": 0.5}, step=step)

    @rule()
    def end_by_an_exception(self) -> None:
        """The exception leaves the ``with`` block: a rescue is saved, and the next process goes on from it."""
        error = ValueError("the training failed")
        self.manager.__exit__(ValueError, error, None)
        self.open()

    @rule()
    def be_killed(self) -> None:
        """The process ends at once."""
        with contextlib.suppress(CheckpointerError):
            self.core.wait()
        die(self.core._owner)
        self.open()

    @invariant()
    def a_record_holds_the_state_of_its_step(self) -> None:
        """Of each record, regular or rescue; and no rescue is older than what its process went on from."""
        if not hasattr(self, "manager"):
            return
        with contextlib.suppress(CheckpointerError):
            self.core.wait()
        for record in self.core.session.manifest.records:
            assert self.held_by(record) == (record.step, record.epoch)
        rescues = [record for record in self.core.session.manifest.records if record.kind == "rescue"]
        assert all(record.step <= self.place["step"] for record in rescues)

    def held_by(self, record: Record) -> tuple[int, int]:
        """Return step and epoch of the state in a payload."""
        with self.storage.open(record.name) as stream:
            state = json.load(stream)
        return state["step"], state["epoch"]


def test_a_record_holds_the_state_of_its_step() -> None:
    """Some thousand reports, refusals, exceptions and restarts in random order."""
    with warnings.catch_warnings():
        # Failed saves and metrics that were not reported are part of the law.
        warnings.simplefilter("ignore", CheckpointerWarning)
        run_state_machine_as_test(
            Reports, settings=settings(max_examples=200 if EVERY > 1 else 400, stateful_step_count=30, deadline=None)
        )


def train_from(step: int, storage: MemoryStorage) -> None:
    """A loop that counts from ``step``, whatever was restored."""
    policy = Policy(EverySteps(100), [KeepLast(1)])
    with CheckpointManager(storage, policy, state=lambda: {"w": step}, format=PlainFormat()) as manager:
        manager.restore()
        manager.observe({}, step=step, epoch=0)


@pytest.mark.parametrize("step", [50, 100])
def test_a_loop_that_starts_over_leaves_no_trace(step: int) -> None:
    """A loop that ignores what was restored is refused, and the next process goes on from the same checkpoint."""
    storage = MemoryStorage()
    train_from(400, storage)
    for _ in range(2):
        with pytest.raises(ObservationError, match=rf"step {step} was reported, but the run goes on from step 400"):
            train_from(step, storage)
        with CheckpointManager(storage) as looking:
            assert ["epoch=0-step=400.ckpt"] == [record.name for record in looking.records]


def test_a_rescue_of_a_step_before_what_was_restored_is_refused() -> None:
    """A rescue under an older step would hold the state of a newer one."""
    storage = MemoryStorage()
    policy = Policy(EverySteps(100), [KeepLast(1)])
    with CheckpointManager(storage, policy, state=dict, format=PlainFormat()) as manager:
        manager.observe({}, step=400, epoch=3)
    with CheckpointManager(storage, policy, state=dict, format=PlainFormat()) as manager:
        manager.restore()
        with pytest.raises(CheckpointerError, match="a rescue of step 100 was asked for, and the run goes on from"):
            manager.rescue("SIGTERM", step=100)
