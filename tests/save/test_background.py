"""Saving in the background: what the loop sees, in which order things happen, and how every failure is reported."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gated import PATIENCE_S, GatedStorage, open_when_waited_for
from support.plain_format import PlainFormat

from checkpointer import (
    Attach,
    Budget,
    CheckpointerWarning,
    CheckpointManager,
    EveryEpochs,
    EverySteps,
    KeepAll,
    KeepBest,
    KeepEvery,
    KeepLast,
    Listener,
    Naming,
    Policy,
    Record,
    Save,
    Skip,
)
from checkpointer.commit.index import read_bounded
from checkpointer.errors import ClosedError, PolicyError, SaveError
from checkpointer.testing import MemoryStorage

BEST = KeepBest(1, "loss", mode="min")
EACH = Policy(EverySteps(1), [BEST, KeepLast(1)])


class Training:
    """A loop whose state is its step, on a storage with a gate."""

    def __init__(self, policy: Policy = EACH, *, background: Any = "wait", **options: Any) -> None:
        self.storage = GatedStorage()
        self.step = 0
        self.manager = CheckpointManager(
            self.storage, policy, state=self.state, format=PlainFormat(), background=background, **options
        )

    def state(self) -> dict[str, int]:
        return {"step": self.step}

    def observe(self, loss: float | None = None, step: int | None = None) -> Any:
        self.step = self.step + 1 if step is None else step
        metrics = {} if loss is None else {"loss": loss}
        return self.manager.observe(metrics, step=self.step, epoch=0, epoch_end=False)

    def observe_and_hold(self, loss: float | None = None) -> Any:
        """Report, and return once the payload stands at the shut gate."""
        self.storage.shut()
        decision = self.observe(loss)
        self.storage.await_arrival()
        return decision

    @property
    def steps(self) -> list[int]:
        return [record.step for record in self.manager.records]


def test_observe_returns_while_the_payload_is_on_its_way() -> None:
    """A record appears only when it is durable, and the status names the unfinished saves."""
    training = Training()
    assert training.observe_and_hold(0.5)
    assert [] == training.steps
    assert training.manager.session.background_status is not None
    assert ["epoch=0-step=1.ckpt"] == list(training.manager.session.background_status.unfinished)
    training.storage.open_gate()
    assert training.manager.wait()
    assert [1] == training.steps
    assert [] == list(training.manager.session.background_status.unfinished)
    training.manager.close()


def test_what_was_there_when_observe_returned_is_what_is_written() -> None:
    """The loop goes on and changes its state; the payload does not."""
    training = Training()
    state = {"list": [1, 2]}
    training.state = lambda: state  # type: ignore[method-assign,assignment,return-value]
    manager = CheckpointManager(training.storage, EACH, state=lambda: state, format=PlainFormat(), background="wait")
    training.storage.shut()
    manager.observe({}, step=1, epoch=0, epoch_end=False)
    state["list"].append(3)
    training.storage.open_gate()
    manager.close()
    assert {"list": [1, 2]} == json.loads(read_bounded(training.storage, "epoch=0-step=1.ckpt"))


def test_stage_commit_alias_retire_listeners_happen_in_that_order() -> None:
    """Nothing is retired, linked or announced before the new payload is durable, and all of it on one thread."""
    seen: list[tuple[str, str, list[str], str]] = []
    policy = Policy(EverySteps(1), [KeepLast(1)], last="link")

    class Tracker(Listener):
        def on_saved(self, record: Record) -> None:
            seen.append(("saved", record.name, payloads(), threading.current_thread().name))

        def on_retired(self, record: Record) -> None:
            seen.append(("retired", record.name, payloads(), threading.current_thread().name))

    training = Training(policy, listeners=[Tracker()])

    def payloads() -> list[str]:
        return sorted(path for path in training.storage.list() if not path.startswith(".checkpointer"))

    training.observe()
    training.manager.wait()
    training.observe_and_hold()
    first, second = "epoch=0-step=1.ckpt", "epoch=0-step=2.ckpt"
    assert [first, "last.ckpt"] == payloads()
    assert 1 == len(seen)
    training.storage.open_gate()
    training.manager.close()
    assert [
        ("saved", first, [first, "last.ckpt"], "checkpointer-writer"),
        ("retired", first, [second, "last.ckpt"], "checkpointer-writer"),
        ("saved", second, [second, "last.ckpt"], "checkpointer-writer"),
    ] == seen


def test_the_loop_does_not_wait_for_the_deletes_of_old_checkpoints() -> None:
    """The writer thread deletes, after the new checkpoint is durable."""
    training = Training(Policy(EverySteps(1), [KeepLast(1)]))
    training.observe()
    training.manager.wait()
    training.storage.may_delete.clear()
    assert training.observe()
    assert training.storage.deleting.wait(PATIENCE_S)
    assert {"epoch=0-step=1.ckpt", "epoch=0-step=2.ckpt"} <= set(training.storage.list())
    training.storage.may_delete.set()
    training.manager.close()
    assert [2] == training.steps
    assert "epoch=0-step=1.ckpt" not in training.storage.list()


def test_decisions_see_the_save_that_is_under_way_as_done() -> None:
    """A worse loss is declined, and the same step attached to, as if the writer were infinitely fast."""
    training = Training(Policy(EverySteps(1), [BEST]))
    training.observe_and_hold(0.5)
    assert "1 epochs" not in training.observe(0.9).reason
    assert (
        "is not in the best by loss" in training.manager.observe({"loss": 0.7}, step=3, epoch=0, epoch_end=False).reason
    )
    assert isinstance(training.observe(0.4, step=1), Attach)
    assert [] == training.steps
    training.storage.open_gate()
    training.manager.close()
    assert [0.4] == [record.metrics["loss"] for record in training.manager.records]


def test_a_save_that_is_due_while_another_runs_waits_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """The default: never more than one copy of the state, and the time is on the books."""
    training = Training()
    open_when_waited_for(training.manager, training.storage)
    training.observe_and_hold(0.5)
    with caplog.at_level(logging.WARNING, "checkpointer"):
        assert training.observe(0.6)
    status = training.manager.session.background_status
    assert status is not None
    assert 1 == status.num_waits
    assert status.waited_s > 0
    assert "step 2: waited" in caplog.text
    training.manager.close()
    assert [1, 2] == training.steps


def test_skip_drops_the_older_save_that_has_not_begun(caplog: pytest.LogCaptureFixture) -> None:
    """The loop does not wait; what is dropped is said, and the newest is written."""
    training = Training(background="skip")
    training.observe_and_hold(0.5)
    assert training.observe(0.6)
    assert isinstance(training.observe(0.55, step=2), Attach)
    assert training.observe(0.7)
    status = training.manager.session.background_status
    assert status is not None
    assert ("epoch=0-step=1.ckpt", "epoch=0-step=3.ckpt") == status.unfinished
    assert (1, 0) == (status.num_skipped, status.num_waits)
    assert "epoch=0-step=2.ckpt is not saved" in caplog.text
    training.storage.open_gate()
    training.manager.close()
    assert [1, 3] == training.steps


def test_a_failed_save_reaches_the_loop_at_the_next_observe_due_or_not() -> None:
    """Also where the fast path would have returned at once; that report can be made again, and training goes on."""
    training = Training(Policy(EverySteps(10), [KeepLast(2)]))
    training.observe(step=9)
    training.storage.broken = OSError(5, "the disk is on fire")
    assert training.observe(step=10)
    assert training.manager._executor.background is not None
    training.manager._executor.background.wait()
    with pytest.raises(SaveError, match=r"step=10.ckpt was not saved \(OSError: .*on fire"):
        training.observe(step=11)
    training.storage.broken = None
    assert not training.observe(step=11)
    assert training.observe(step=20)
    training.manager.close()
    assert [20] == training.steps


def leave(manager: CheckpointManager) -> None:
    with manager:
        pass


@pytest.mark.parametrize("end", [CheckpointManager.wait, CheckpointManager.close, leave])
def test_a_failed_save_is_raised_by_whatever_ends_the_training(end: Callable[[CheckpointManager], object]) -> None:
    """The manager is closed nevertheless, and says it once."""
    training = Training()
    training.storage.broken = OSError(5, "the disk is on fire")
    training.observe()
    with pytest.raises(SaveError, match="on fire"):
        end(training.manager)
    training.manager.close()
    with pytest.raises(ClosedError, match="closed"):
        training.observe()


def test_tolerated_failures_are_counted_in_the_order_of_the_saves() -> None:
    """One in a row is a warning, whenever the loop collects it; a success in between resets the count."""
    training = Training(tolerate_failures=1)
    for broken in (True, False, True):
        training.storage.broken = OSError(5, "the disk is on fire") if broken else None
        training.observe()
        with pytest.warns(CheckpointerWarning, match="1 of 1 tolerated") if broken else warnings.catch_warnings():
            training.manager.wait()
    training.observe()
    with pytest.raises(SaveError, match="on fire"):
        training.manager.close()
    assert [2] == training.steps


def test_after_a_failed_save_the_next_decision_does_not_count_on_it() -> None:
    """A lost checkpoint does not compete: a worse one is the best."""
    training = Training(Policy(EverySteps(1), [BEST]), tolerate_failures=9)
    training.storage.broken = OSError(5, "the disk is on fire")
    training.observe(0.1)
    with pytest.warns(CheckpointerWarning, match="tolerated"):
        training.manager.wait()
    training.storage.broken = None
    assert training.observe(0.9)
    training.manager.close()
    assert [2] == training.steps


def test_metrics_for_a_step_whose_save_failed_are_no_second_error() -> None:
    """The save's own failure is raised."""
    training = Training(tolerate_failures=9)
    training.storage.broken = OSError(5, "the disk is on fire")
    training.observe_and_hold(0.1)
    assert isinstance(training.observe(0.2, step=1), Attach)
    training.storage.open_gate()
    with pytest.warns(CheckpointerWarning, match="tolerated"):
        training.manager.close()
    assert [] == training.steps


def test_the_writers_death_is_never_silent(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever ends the thread, even what no handler catches, is raised in the loop, tolerated or not."""
    training = Training(tolerate_failures=9)
    training.storage.broken = SystemExit(3)
    training.observe()
    with pytest.raises(SaveError, match="SystemExit"):
        training.manager.wait()
    assert "SystemExit" in caplog.text
    training.storage.broken = None
    assert training.observe()
    training.manager.close()
    assert [2] == training.steps


def test_a_thread_that_is_gone_is_found_out() -> None:
    """If it vanishes silently, a wait ends with an error."""
    training = Training()
    background: Any = training.manager._executor.background
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    with background._condition:
        training.storage.shut()
    training.observe()
    training.storage.await_arrival()
    real, background._thread = background._thread, thread
    with pytest.raises(SaveError, match="the writer thread is gone"):
        training.manager.wait()
    background._jobs.append(None)  # What the real one is about to take off.
    training.storage.open_gate()
    real.join(PATIENCE_S)


def test_no_thread_to_start_is_a_failed_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine at its limit: the loop raises it at once, and nothing is left unfinished."""
    training = Training(tolerate_failures=1)

    def refuse(self: threading.Thread) -> None:
        msg = "can't start new thread"
        raise RuntimeError(msg)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.warns(CheckpointerWarning, match="can't start new thread"):
            assert isinstance(training.observe(), Skip)
    assert training.manager.wait()
    assert training.observe()
    training.manager.close()


def test_a_state_that_cannot_be_copied_says_what_and_leaves_nothing_under_way() -> None:
    """A lambda could not have been saved in the foreground either; here it is said at once."""
    manager = CheckpointManager(None, EACH, state=lambda: {"f": lambda: 1}, background="wait")
    with pytest.raises(
        SaveError, match=r"cannot be copied.*state\['f'\] is a builtins.function.*leave it out of the state"
    ):
        manager.observe({}, step=1, epoch=0, epoch_end=False)
    manager.close()


def test_rescue_finishes_what_is_under_way_and_is_durable_on_return() -> None:
    """The newest of the two is the rescue, and its state is that of the moment."""
    training = Training()
    open_when_waited_for(training.manager, training.storage)
    training.observe_and_hold(0.5)
    training.step = 2
    assert training.manager.rescue("a signal", step=2)
    assert [1, 2] == training.steps
    assert "rescue" == training.manager.records[-1].kind
    training.manager.close()


def test_rescue_at_the_step_that_is_under_way_writes_nothing_unless_that_failed() -> None:
    """One payload is enough, but it has to be there."""
    training = Training()
    open_when_waited_for(training.manager, training.storage)
    training.observe_and_hold(0.5)
    assert "saved already" in training.manager.rescue("a signal").reason
    training.storage.broken = OSError(5, "the disk is on fire")
    training.observe_and_hold(0.4)
    assert training.manager._executor.background is not None
    training.manager._executor.background.wait()
    training.storage.broken = None
    assert training.manager.rescue("a signal")
    with pytest.raises(SaveError, match="on fire"):
        training.manager.close()
    assert ["regular", "rescue"] == [record.kind for record in training.manager.records]


def test_a_wait_that_is_bounded_gives_up_and_what_is_written_is_still_committed() -> None:
    """Neither a rescue nor close() waits longer than its timeout; the writer goes on."""
    training = Training()
    training.observe_and_hold(0.5)
    with pytest.raises(SaveError, match=r"after 0\.1 s epoch=0-step=1\.\w+ is still being written, so no rescue was"):
        training.manager.rescue(timeout=0.1)
    with pytest.warns(CheckpointerWarning, match=r"after 0\.0 s epoch=0-step=1\.\w+ is still .*, and close\(\)"):
        training.manager.close(timeout=0.0)
    training.storage.open_gate()
    assert training.manager.wait(60.0)
    assert [1] == training.steps


def test_leaving_the_with_block_by_an_exception_shows_that_exception() -> None:
    """The rescue is written, and the writer's own failure is a warning beside it."""
    training = Training()
    open_when_waited_for(training.manager, training.storage)

    def train() -> None:
        with training.manager:
            training.storage.broken = OSError(5, "the disk is on fire")
            training.observe_and_hold(0.5)
            training.manager._executor.background.wait()  # type: ignore[union-attr]
            training.storage.broken = None
            raise ZeroDivisionError

    with pytest.warns(CheckpointerWarning, match="on fire"), pytest.raises(ZeroDivisionError):
        train()
    assert ["rescue"] == [record.kind for record in training.manager.records]


def test_close_in_an_except_block_raises_the_writers_error_with_the_other_behind_it() -> None:
    """Both are kept."""
    training = Training()
    training.storage.broken = OSError(5, "the disk is on fire")
    training.observe()

    def train() -> None:
        try:
            raise ZeroDivisionError
        except ZeroDivisionError:
            training.manager.close()

    with pytest.raises(SaveError, match="on fire") as caught:
        train()
    assert isinstance(caught.value.__context__, ZeroDivisionError)
    assert isinstance(caught.value.__cause__, OSError)


def test_restore_waits_for_what_is_under_way() -> None:
    """The newest is what was observed last, not what happened to be written by then."""
    training = Training()
    open_when_waited_for(training.manager, training.storage)
    training.observe(0.5)
    training.observe_and_hold(0.6)
    restored = training.manager.restore()
    assert restored is not None
    assert {"step": 2} == restored.state
    training.manager.close()


def test_restore_works_after_a_failed_save_whose_error_is_still_raised_later() -> None:
    """A restore returns a state; the next report raises the failure."""
    training = Training()
    training.observe(0.5)
    training.manager.wait()
    training.storage.broken = OSError(5, "the disk is on fire")
    training.observe(0.4)
    restored = training.manager.restore()
    assert restored is not None
    assert 1 == restored.step
    training.storage.broken = None
    with pytest.raises(SaveError, match="on fire"):
        training.observe(0.3)
    assert training.observe(0.3)
    training.manager.close()


def test_state_dict_while_a_save_is_under_way_takes_it_as_done() -> None:
    """It may lie in that very payload: where it is read, the save has succeeded."""
    inside: list[dict[str, Any]] = []
    storage = GatedStorage()

    def take() -> dict[str, Any]:
        inside.append(manager.session.state_dict())
        return {}

    manager = CheckpointManager(storage, EACH, state=take, format=PlainFormat(), background="wait")
    storage.shut()
    manager.observe({"loss": 0.5}, step=1, epoch=0, epoch_end=False)
    under_way = manager.session.state_dict()
    storage.open_gate()
    manager.wait()
    assert inside == [under_way] == [manager.session.state_dict()]
    assert 1 == under_way["since"]["step"]
    manager.close()


def test_decide_and_commit_go_through_the_writer_and_adopting_waits() -> None:
    """The pair for trainers that choose the moment; a file that they wrote is adopted at once."""
    training = Training(Policy(EverySteps(1), [KeepLast(2)]))
    open_when_waited_for(training.manager, training.storage)
    training.storage.shut()
    decision = training.manager.session.decide({}, 1, 0, epoch_end=False)
    assert training.manager.session.commit(decision)
    training.storage.await_arrival()
    assert [] == training.steps
    training.storage.write("theirs.ckpt", b'{"step": 2}')
    second = training.manager.session.decide({}, 2, 0, epoch_end=False)
    assert isinstance(second, Save)
    assert training.manager.session.commit(second, "theirs.ckpt")
    assert [1, 2] == training.steps
    training.manager.close()


def test_a_listener_may_use_the_manager() -> None:
    """On the writer thread nothing waits for the writer thread: a listener pins, and looks at what is saved."""
    names: list[str] = []

    class Pinner(Listener):
        def on_saved(self, record: Record) -> None:
            assert training.manager.wait()
            assert training.manager.last is not None
            names.append(training.manager.last.name)
            if record.step == 1:
                training.manager.pin(record.name)

    training = Training(Policy(EverySteps(1), [KeepLast(1)]), listeners=[Pinner()])
    for _ in range(3):
        training.observe()
    training.manager.close()
    assert [1, 3] == training.steps
    assert [f"epoch=0-step={step}.ckpt" for step in (1, 2, 3)] == names


def test_the_mirror_gets_a_checkpoint_once_it_is_durable() -> None:
    """It copies from the directory, so it must not get a record before its payload is there."""
    mirror = MemoryStorage()
    training = Training(Policy(EverySteps(1), [KeepLast(1)]), mirror=mirror)
    training.observe_and_hold()
    assert training.manager.session.mirror_status is not None
    assert () == training.manager.session.mirror_status.behind
    training.storage.open_gate()
    training.manager.close()
    assert b'{"step": 1}' == read_bounded(mirror, "epoch=0-step=1.ckpt")


@pytest.mark.parametrize("value", ["later", 1, 0])
def test_other_values_of_background_are_refused(value: object) -> None:
    """A typo must not mean that nothing is in the background."""
    with pytest.raises(PolicyError, match="expected 'wait', 'skip' or None"):
        CheckpointManager(None, EACH, state=dict, background=value)  # type: ignore[arg-type]


def test_what_a_trainer_writes_cannot_be_written_behind_its_back() -> None:
    """It would read the live objects while the training changes them."""
    with pytest.raises(PolicyError, match="background= needs state="):
        CheckpointManager(None, EACH, save=lambda path: None, background="wait")


def test_a_manager_that_is_dropped_exists_until_its_save_is_done() -> None:
    """While the writer works, its owner counts as alive, and its staging folder is not swept."""
    from checkpointer.storage.owner import is_live

    training = Training()
    owner = training.manager._owner
    training.observe_and_hold(0.5)
    thread = training.manager._executor.background._thread  # type: ignore[union-attr]
    del training.manager
    assert is_live(owner)
    training.storage.open_gate()
    assert thread is not None
    thread.join(PATIENCE_S)
    reader = CheckpointManager(training.storage, EACH, format=PlainFormat())
    assert [1] == [record.step for record in reader.records]


# The same script, in the background and not


POLICIES = {
    "best and last": Policy(EverySteps(2), [KeepBest(2, "loss", mode="min"), KeepLast(1)]),
    "link": Policy(EverySteps(1), [BEST], last="link", best="link"),
    "slot": Policy(EverySteps(1), [BEST], last="copy", best="copy"),
    "fixed name": Policy(EverySteps(1), [KeepLast(1)], name=Naming("model", version_counter=False)),
    "thinned": Policy(EverySteps(1), [KeepEvery(steps=4), BEST, KeepLast(1), Budget(bytes=60)]),
    "owing": Policy(EverySteps(2), [BEST]),
    "epochs": Policy(EveryEpochs(1), [BEST, KeepLast(1)], name="{epoch}-{loss:.1f}"),
}
LOSSES = st.one_of(st.none(), st.integers(0, 5).map(float), st.just(float("nan")))
SCRIPTS = st.lists(
    st.one_of(
        st.tuples(st.just("observe"), st.integers(1, 3), LOSSES, st.booleans()),
        st.tuples(st.just("again"), st.integers(0, 2), st.integers(0, 5).map(float), st.booleans()),
        st.tuples(st.sampled_from(["pin", "rescue", "restore", "wait", "shut"])),
    ),
    min_size=2,
    max_size=14,
)


class Scripted:
    """Runs a script, and notes what the loop can see."""

    def __init__(self, policy: Policy, *, background: Any) -> None:
        self.training = Training(policy, background=background)
        self.background = background
        if background:
            open_when_waited_for(self.training.manager, self.training.storage)
        self.noted: list[Any] = []
        self.steps: list[int] = []

    def do(self, action: str, *rest: Any) -> None:
        manager = self.training.manager
        if action == "observe":
            stride, loss, ended = rest
            self.training.step = step = max([0, self.training.step, *self.steps[-1:]]) + stride
            self.note(step, loss, ended)
        elif action == "again" and self.steps:
            back, loss, ended = rest
            self.note(self.steps[-1 - min(back, len(self.steps) - 1)], loss, ended)
        elif action == "pin":
            manager.wait()
            if manager.last is not None:
                manager.pin(manager.last.name)
        elif action == "rescue":
            self.noted.append(_as_text(manager.rescue("asked for")))
        elif action == "restore":
            restored = manager.restore()
            self.noted.append(None if restored is None else (restored.step, restored.state))
            self.training.step = 0 if restored is None else restored.step
            self.steps = []
        elif action == "wait":
            manager.wait()
        elif action == "shut" and self.background:
            self.training.storage.shut()

    def note(self, step: int, loss: float | None, ended: bool) -> None:
        metrics = {} if loss is None else {"loss": loss}
        self.steps.append(step)
        try:
            decision = self.training.manager.observe(metrics, step=step, epoch=step // 4, epoch_end=ended)
        except Exception as error:
            self.noted.append(f"{type(error).__name__}: {error}")
            return
        self.noted.append(_as_text(decision))

    def end(self) -> tuple[Any, ...]:
        manager = self.training.manager
        manager.close()
        files = {path for path in self.training.storage.list() if not path.startswith(".checkpointer")}
        facts = [
            (r.name, r.step, r.kind, r.pinned, r.reason, r.serial, repr(dict(r.metrics)), r.epoch_end, r.digest)
            for r in manager.records
        ]
        return self.noted, facts, files


def _as_text(decision: Any) -> Any:
    return type(decision).__name__, getattr(decision, "name", ""), getattr(decision, "retire", ()), decision.reason


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(sorted(POLICIES)), script=SCRIPTS)
def test_a_script_sees_and_leaves_the_same_in_the_background(name: str, script: list[tuple[Any, ...]]) -> None:
    """However late the writer is, every decision, reason, record and file is what it would be without it."""
    ends = []
    for background in (None, "wait"):
        scripted = Scripted(POLICIES[name], background=background)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CheckpointerWarning)
            for action in script:
                scripted.do(*action)
            ends.append(scripted.end())
    assert ends[0] == ends[1]


# Real processes


def test_a_state_without_tensors_does_not_bring_torch_in(tmp_path: Path) -> None:
    """The first save would wait for seconds of imports."""
    done = run("gate.set(); manager.close(); print('torch' in sys.modules)", str(tmp_path))
    assert ("False\n", "") == (done.stdout, done.stderr)


_LATE = """
import os, signal, sys, threading
from support.plain_format import PlainFormat
from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy
from checkpointer.storage.owner import new_owner
from checkpointer.storage import LocalStorage

gate = threading.Event()
came = threading.Event()

class Late(LocalStorage):
    broken = False

    def upload(self, path):
        upload = super().upload(path)
        if not path.startswith(".checkpointer"):
            finish = upload.finish
            def late():
                came.set()
                assert gate.wait(60)
                if self.broken:
                    raise OSError(5, "the disk is on fire")
                finish()
            upload.finish = late
        return upload

storage = Late(sys.argv[1], new_owner())
manager = CheckpointManager(
    storage, Policy(EverySteps(1), [KeepLast(2)]), state=lambda: {"step": 1}, format=PlainFormat(), background="wait"
)
manager.observe({}, step=1, epoch=0, epoch_end=False)
came.wait(60)
"""


def run(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", _LATE + code, *args], capture_output=True, text=True, timeout=2 * PATIENCE_S, env=env
    )


def steps_in(folder: Path) -> list[int]:
    return [record.step for record in CheckpointManager(folder, EACH, format=PlainFormat()).records]


def test_a_program_that_ends_without_close_still_writes_what_is_under_way(tmp_path: Path) -> None:
    """The interpreter waits, even where the storage uses executors, which it turns off before it waits for threads."""
    code = """
from concurrent.futures import ThreadPoolExecutor
pool = ThreadPoolExecutor(1)
finish = storage.write
storage.write = lambda *args: pool.submit(finish, *args).result(60)
import threading
threading._register_atexit(gate.set)  # Registered last, it is called first: the program has ended by then.
"""
    done = run(code, str(tmp_path))
    assert ("", 0) == (done.stderr, done.returncode)
    assert [1] == steps_in(tmp_path)


def test_a_program_that_ends_without_close_says_what_it_could_not_write(tmp_path: Path) -> None:
    """No caller is left to raise it to, and it is logged nevertheless."""
    done = run("storage.broken = True; gate.set()", str(tmp_path))
    assert "epoch=0-step=1.ckpt: OSError: [Errno 5] the disk is on fire" in done.stderr
    assert [] == steps_in(tmp_path)


def test_ctrl_c_ends_the_wait_and_not_the_save(tmp_path: Path) -> None:
    """The manager stays usable, and what was under way is there in the end."""
    code = """
import time
waiting = manager._executor.background._condition
wait = waiting.wait
def interrupt(timeout=None):
    waiting.wait = wait
    os.kill(os.getpid(), signal.SIGINT)
    return wait(60)
waiting.wait = interrupt
for call in (manager.wait, manager.close):
    try:
        call()
    except KeyboardInterrupt:
        print("interrupted", manager.session.background_status.unfinished)
        waiting.wait = interrupt
waiting.wait = wait
gate.set()
manager.close()
"""
    done = run(code, str(tmp_path))
    assert "" == done.stderr
    assert 2 * ["interrupted ('epoch=0-step=1.ckpt',)"] == done.stdout.splitlines()
    assert [1] == steps_in(tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_in_a_forked_child_nothing_is_under_way(tmp_path: Path) -> None:
    """The save belongs to its parent: it does not wait for the parent's thread, and does not write it again."""
    code = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Of forking with threads: that is the point.
child = os.fork()
if not child:
    print(manager.wait(), manager.session.background_status.unfinished, flush=True)
    os._exit(0)
os.waitpid(child, 0)
gate.set()
manager.close()
"""
    done = run(code, str(tmp_path))
    assert ("", "True ()\n") == (done.stderr, done.stdout)
    assert [1] == steps_in(tmp_path)


def test_killed_with_a_save_under_way_the_one_before_is_whole(tmp_path: Path) -> None:
    """And what the dead left half-way is swept."""
    code = """
gate.set()
manager.wait()
gate.clear()
came.clear()
manager.observe({}, step=2, epoch=0, epoch_end=False)
came.wait(60)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = run(code, str(tmp_path))
    assert -signal.SIGKILL == done.returncode
    with CheckpointManager(tmp_path, EACH, state=dict, format=PlainFormat()) as manager:
        restored = manager.restore()
    assert restored is not None
    assert {"step": 1} == restored.state
    assert not (tmp_path / ".checkpointer/staging").exists()


@pytest.mark.parametrize("busy", ["wait", "skip"])
def test_a_ctrl_c_while_the_thread_starts_leaves_one_writer(
    tmp_path: Path, busy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interrupted save may be missing. Each other one holds the state of its own step, and is written once."""
    state = {"step": 0}
    policy = Policy(EverySteps(1), [KeepAll()])
    real = threading._start_new_thread  # type: ignore[attr-defined]

    def late(function: Any, arguments: Any) -> Any:
        def begin() -> None:
            time.sleep(0.2)
            function(*arguments)

        return real(begin, ())

    with CheckpointManager(
        tmp_path, policy, state=lambda: dict(state), background=busy, tolerate_failures=9
    ) as manager:
        monkeypatch.setattr(threading, "_start_new_thread", late)  # As on a machine with much to do.
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(KeyboardInterrupt):
                manager.observe({}, step=1)
        finally:
            signal.signal(signal.SIGALRM, before)
        for step in (2, 3, 4):
            state["step"] = step
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CheckpointerWarning)
                manager.observe({}, step=step)
        monkeypatch.setattr(threading, "_start_new_thread", real)
        manager.wait()
        for record in manager.records:
            restored = manager.restore(record.name)
            assert restored is not None
            assert {"step": 0 if record.step == 1 else record.step} == restored.state
        assert 4 == manager.records[-1].step
