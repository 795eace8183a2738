"""The manager beside a plain model: whatever is done in whatever order, what was acknowledged is there."""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.plain_format import PlainFormat

from checkpointer import (
    Budget,
    CheckpointerWarning,
    CheckpointManager,
    EverySteps,
    KeepBest,
    KeepEvery,
    KeepLast,
    Naming,
    Policy,
)
from checkpointer.errors import NoValidCheckpointError
from checkpointer.testing import MemoryStorage, die

BEST = KeepBest(2, "loss", mode="min")
POLICIES = {
    "best and last": Policy(EverySteps(2), [BEST, KeepLast(1)]),
    "link": Policy(EverySteps(1), [BEST], last="link", best="link"),
    "slot": Policy(EverySteps(1), [BEST], last="copy", best="copy"),
    "fixed name": Policy(EverySteps(1), [KeepLast(1)], name=Naming("model", version_counter=False)),
    "thinned": Policy(EverySteps(1), [KeepEvery(steps=4), BEST, KeepLast(1), Budget(bytes=120)]),
}
LOSSES = st.one_of(st.none(), st.integers(0, 5).map(float), st.sampled_from([math.nan, math.inf, -math.inf]))


class Training(RuleBasedStateMachine):
    """A run that saves, is killed, rolls back, pins and rescues; the model knows the state of every write."""

    def __init__(self) -> None:
        super().__init__()
        self.storage = MemoryStorage()
        self.foreign: dict[str, bytes] = {}
        self.step = 0
        self.writes = 0
        self.state: dict[str, int] = {}
        self.newest: dict[str, int] | None = None
        """As this process sees it."""
        self.durable: dict[str, int] | None = None
        """As the next process will: going back becomes so with the next save."""
        self.abandoned: set[str] = set()
        self.left_behind: set[str] = set()
        """Abandoned by this process, and on record with its next save."""
        self.pinned: set[str] = set()

    @initialize(name=st.sampled_from(sorted(POLICIES)))
    def begin(self, name: str) -> None:
        """Choose a policy, and start the first process."""
        self.policy = POLICIES[name]
        self.start()

    def start(self) -> None:
        """A new process."""
        self.manager = CheckpointManager(self.storage, self.policy, state=lambda: self.state, format=PlainFormat())

    def state_at(self, step: int) -> None:
        """Every state is another one, so that a wrong payload shows."""
        self.writes += 1
        self.step = step
        self.state = {"step": step, "write": self.writes}

    @rule(stride=st.integers(1, 3), loss=LOSSES)
    def observe(self, stride: int, loss: float | None) -> None:
        """Train on, and report."""
        self.state_at(self.step + stride)
        metrics = {} if loss is None else {"loss": loss}
        if self.manager.observe(metrics, step=self.step, epoch=0, epoch_end=False):
            self.saved()

    def saved(self) -> None:
        """The state was acknowledged."""
        self.newest = self.durable = self.state
        self.abandoned |= self.left_behind
        self.left_behind = set()

    @precondition(lambda self: self.manager.records)
    @rule(data=st.data(), loss=st.integers(0, 5).map(float))
    def attach(self, data: st.DataObject, loss: float) -> None:
        """Report a late metric of a step that is saved."""
        record = data.draw(st.sampled_from(list(self.manager.records)))
        if record.kind == "regular":
            assert not self.manager.observe({"loss": loss}, step=record.step, epoch=0, epoch_end=False)

    @rule(killed=st.booleans())
    def restart(self, killed: bool) -> None:
        """End the process, or have it killed, and restore the newest."""
        if killed:
            die(self.manager._owner)
        else:
            self.manager.close()
        self.start()
        self.left_behind = set()
        self.newest = self.durable
        try:
            restored = self.manager.restore()
        except NoValidCheckpointError:
            # Only checkpoints of others: not taken for an empty directory.
            assert self.durable is None
            assert self.foreign
            return
        assert self.durable == (None if restored is None else restored.state)
        self.step = 0 if restored is None else restored.step
        self.state = {} if restored is None else restored.state

    @precondition(lambda self: len(self.manager.records) > 1)
    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        """Restore an older checkpoint; those beyond are abandoned."""
        record = data.draw(st.sampled_from(list(self.manager.records)))
        restored = self.manager.restore(record.name)
        assert restored is not None
        self.step, self.state = restored.step, restored.state
        # A rescue of the same step is newer than the checkpoint that was asked for.
        self.newest = self.content(self.manager.records[-1].name)
        self.left_behind = {r.token for r in self.manager.session.manifest.abandoned}

    @precondition(lambda self: self.manager.records)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        """Pin a checkpoint for good."""
        record = data.draw(st.sampled_from(list(self.manager.records)))
        self.manager.pin(record.name)
        self.pinned.add(record.token)

    @precondition(lambda self: self.step)
    @rule()
    def rescue(self) -> None:
        """Save because of a signal."""
        if self.manager.rescue("SIGTERM", step=self.step):
            self.saved()

    @rule(ahead=st.integers(1, 3))
    def another_program_writes_a_file(self, ahead: int) -> None:
        """It takes a name that may come next."""
        name = f"epoch=0-step={self.step + ahead}.ckpt"
        if name not in self.storage.list():
            self.foreign[name] = b"theirs"
            self.storage.write(name, b"theirs")

    def content(self, name: str) -> Any:
        """What a payload holds."""
        with self.storage.open(name) as stream:
            return json.load(stream)

    @invariant()
    def every_record_has_its_own_payload(self) -> None:
        """Of its step; and nothing lies about that no record, alias or other program accounts for."""
        if not hasattr(self, "manager"):
            return
        manifest = self.manager.session.manifest
        for record in manifest.records:
            assert record.step == self.content(record.name)["step"]
        accounted = {r.name for r in manifest.records} | set(self.foreign) | set(self.manager.policy.aliases)
        assert {path for path in self.storage.list() if not path.startswith(".checkpointer")} <= accounted

    @invariant()
    def nothing_that_must_stay_is_gone(self) -> None:
        """Files of others, abandoned checkpoints, pinned ones."""
        if not hasattr(self, "manager"):
            return
        for name, data in self.foreign.items():
            with self.storage.open(name) as stream:
                assert data == stream.read()
        tokens = {record.token for record in self.manager.session.manifest.records}
        assert self.abandoned <= tokens
        assert self.pinned <= tokens

    @invariant()
    def newest_and_best_are_what_they_say(self) -> None:
        """The newest acknowledged state is last; no other ranks before the best."""
        if not hasattr(self, "manager") or self.newest is None:
            return
        assert self.manager.last is not None
        assert self.newest == self.content(self.manager.last.name)
        losses = [r.metrics["loss"] for r in self.manager.session.manifest.history if "loss" in r.metrics]
        proper = [loss for loss in losses if loss > -math.inf]
        if proper and self.policy.ranking:
            assert self.manager.best is not None
            assert min(proper) == self.manager.best.metrics["loss"]


def test_manager_agrees_with_the_model() -> None:
    """Some thousand steps in random order."""
    from hypothesis.stateful import run_state_machine_as_test

    with warnings.catch_warnings():
        # Names taken and metrics not reported are part of the play.
        warnings.simplefilter("ignore", CheckpointerWarning)
        run_state_machine_as_test(Training, settings=settings(max_examples=150, stateful_step_count=30, deadline=None))
