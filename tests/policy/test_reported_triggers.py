"""Triggers and rules that look at what is reported: counts, improvements, functions, and the writer thread."""

from __future__ import annotations

import math
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from checkpointer import (
    AnyOf,
    CheckpointManager,
    Continuous,
    EveryCount,
    EveryFraction,
    EverySteps,
    KeepAll,
    KeepBest,
    KeepFor,
    KeepLast,
    KeepWhere,
    OnImprovement,
    Policy,
    Progress,
    Record,
    When,
)
from checkpointer.errors import ObservationError, PolicyError
from checkpointer.policy.triggers import Trigger
from checkpointer.ports import Listener
from checkpointer.records.record import Observation
from checkpointer.testing import FakeClock
from checkpointer.tools.history import History
from checkpointer.tools.simulate import simulate


def spiked(now: Progress) -> bool:
    """Return whether the loss is large."""
    return now.metrics["loss"] > 10


def tenth(record: Record) -> bool:
    """Return whether the step is a multiple of ten."""
    return record.step % 10 == 0


def saved_steps(when: Trigger, reports: list[dict[str, float]], directory: Any = None) -> list[int]:
    """Return the steps (from 1) at which a loop that makes these reports saves everything that is due."""
    with CheckpointManager(directory, Policy(when, [KeepAll()]), state=dict) as manager:
        manager.restore()
        first = max((record.step for record in manager.records), default=0) + 1
        return [step for step, metrics in enumerate(reports, first) if manager.observe(metrics, step, epoch_end=False)]


def counts(*tokens: float) -> list[dict[str, float]]:
    """Return reports of a count."""
    return [{"tokens": value} for value in tokens]


def losses(*values: float) -> list[dict[str, float]]:
    """Return reports of a loss."""
    return [{"loss": value} for value in values]


@pytest.mark.parametrize(
    ("when", "reports", "expected"),
    [
        (EveryCount("tokens", 100), counts(60, 120, 180, 240, 500, 501), [2, 4, 5]),
        (EveryCount("tokens", 100), [{}, *counts(100), {}, *counts(math.nan, math.inf, 199, 200)], [2, 7]),
        (OnImprovement("loss", mode="min"), losses(3, 2, 2.5, math.nan, 1, -math.inf, 1), [1, 2, 5]),
        (OnImprovement("loss", mode="max"), [{}, *losses(3, 2, math.inf, 4)], [2, 5]),
        (AnyOf(EverySteps(2), OnImprovement("loss", mode="min")), losses(3, 4, 3.5, 5, 2), [1, 2, 4, 5]),
        (When(spiked), losses(1, 11, 3, 12), [2, 4]),
        (EveryFraction(0.5, of=5), losses(*range(8)), [3, 5, 8]),
    ],
)
def test_what_is_reported_makes_a_save_due(when: Trigger, reports: list[dict[str, float]], expected: list[int]) -> None:
    """Counts are crossed, improvements are of all due points before, and a missing metric is never due."""
    assert expected == saved_steps(when, reports)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 1 / 3, 0.07, 1])
@pytest.mark.parametrize("of", [1, 7, 10, 1000])
def test_a_fraction_of_the_run_ends_with_the_run(fraction: float, of: int) -> None:
    """Each part counts once, at one step, and 0.1 of the run makes ten saves of it if it has as many steps."""
    trigger, since, due = EveryFraction(fraction, of=of), Progress(), []
    for step in range(1, of + 1):
        if trigger.due(Progress(step=step), since):
            since = Progress(step=step)
            due.append(step)
        assert trigger.horizon(since).step > step
    assert min(of, int(1 / fraction + 1e-9)) == len(due)


def test_counts_and_improvements_go_on_after_a_restart(tmp_path: Path) -> None:
    """A new process counts from what the checkpoints have reported, and so does one that gets the host's state."""
    assert [2] == saved_steps(EveryCount("tokens", 100), counts(60, 120), tmp_path / "count")
    assert [5] == saved_steps(EveryCount("tokens", 100), counts(160, 199, 210), tmp_path / "count")
    assert [1, 2] == saved_steps(OnImprovement("loss", mode="min"), losses(3, 2), tmp_path / "loss")
    assert [4] == saved_steps(OnImprovement("loss", mode="min"), losses(2.5, 1), tmp_path / "loss")

    policy = Policy(OnImprovement("loss", mode="min"), [KeepBest(1, "loss", mode="max")])
    with CheckpointManager(tmp_path / "host", policy, state=dict) as manager:
        manager.observe({"loss": 3.0}, 1)
        assert not manager.observe({"loss": 1.0}, 2)  # An improvement that the rule declines.
        state = manager.session.state_dict()
    with CheckpointManager(tmp_path / "host", policy, state=dict) as manager:
        manager.session.load_state_dict(state)
        assert not manager.session.decide({"loss": 2.0}, 3).due  # type: ignore[union-attr]  # It is a Skip.


def test_a_continuous_save_waits_for_the_writer_and_not_the_loop_for_it() -> None:
    """While the thread is busy nothing is due; as soon as it is free the next report is."""
    is_free = threading.Event()

    class Slow(Listener):
        def on_saved(self, record: Any) -> None:
            is_free.wait(30)

    clock = FakeClock(1000.0)
    policy = Policy(Continuous(5), [KeepLast(1)])
    options: Any = {"state": dict, "background": "wait", "listeners": [Slow()], "clock": clock}
    with CheckpointManager(None, policy, **options) as manager:
        clock.advance(5)
        assert manager.observe({}, 1)
        clock.advance(60)
        assert not any(manager.observe({}, step) for step in range(2, 50))
        is_free.set()
        manager.wait()
        assert manager.observe({}, 50)
        status = manager.session.background_status
        assert status is not None
        assert 0 == status.num_waits
        assert not manager.observe({}, 51)
        manager.wait()
        clock.advance(4.9)
        assert not manager.observe({}, 52)


def test_rules_keep_by_age_and_by_a_function() -> None:
    """The age counts from the newest checkpoint; a function is asked of each record."""
    clock = FakeClock(0.0)
    policy = Policy(EverySteps(1), [KeepFor(timedelta(seconds=25)), KeepWhere(tenth)])
    with CheckpointManager(None, policy, state=dict, clock=clock) as manager:
        for step in range(8, 15):
            clock.advance(10)
            manager.observe({}, step)
        assert [10, 12, 13, 14] == [record.step for record in manager.records]


@pytest.mark.parametrize("when", [When(spiked), OnImprovement("loss", mode="max"), EveryCount("tokens", 10**9)])
def test_the_file_and_the_plan_name_them(when: Trigger) -> None:
    """A policy goes to YAML and back; functions go by name, and one that is not known is refused."""
    policy = Policy(AnyOf(when, EveryFraction(0.1, of=10_000), Continuous(30)), [KeepFor(60), KeepWhere(tenth)])
    text = policy.to_yaml()
    assert policy == Policy.from_yaml(text, known={"spiked": spiked, "tenth": tenth})
    assert "every 0.1 of 10000 steps or as often as the storage allows, but at least 30 s apart; keep those" in str(
        policy
    )
    with pytest.raises(
        PolicyError, match=r"in 'keep\[1\]\.KeepWhere\.predicate': 'tenth' is not a known function; pass"
    ):
        Policy.from_yaml(text, known={"spiked": spiked})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EveryCount("", 5), r"EveryCount\.metric is ''; expected the name under which"),
        (lambda: EveryCount("tokens", 0), r"EveryCount\.n is 0; expected a whole number of at least 1"),
        (lambda: EveryFraction(0, of=5), r"EveryFraction\.fraction is 0; expected more than 0 and at most 1"),
        (lambda: EveryFraction(1.5, of=5), r"EveryFraction\.fraction is 1\.5"),
        (lambda: OnImprovement("loss", mode="best"), r"OnImprovement\.mode is 'best'; expected 'min' or 'max'"),  # type: ignore[arg-type]
        (lambda: When(lambda now: True), r"When\.predicate is <function .*; expected a function made with def"),
        (lambda: KeepWhere("tenth"), r"KeepWhere\.predicate is 'tenth'; expected a function made with def"),  # type: ignore[arg-type]
        (lambda: KeepFor(0), r"the interval of the rule is 0; expected more than 0"),
        (lambda: Continuous(-1), r"the interval of the trigger is -1; expected seconds of at least 0"),
    ],
)
def test_bad_values_are_named(make: Any, message: str) -> None:
    """The field, the value and what was expected."""
    with pytest.raises(PolicyError, match=message):
        make()


def test_a_function_that_fails_is_named() -> None:
    """The report is refused, and the message says which function failed, on what."""
    with (
        CheckpointManager(None, Policy(When(spiked), [KeepAll()]), state=dict) as manager,
        pytest.raises(ObservationError, match=r"spiked failed on Progress\(.*KeyError\('loss'\); fix the function"),
    ):
        manager.observe({}, 1)


def test_a_simulation_needs_what_the_trigger_looks_at() -> None:
    """It decides as a manager would, and refuses a history without the metric."""
    reports = [
        Observation(metrics=report, step=step, epoch=0, time=0.0)
        for step, report in enumerate(counts(60, 120, 130, 250), 1)
    ]
    history = History(observations=tuple(reports))
    timeline = simulate(Policy(EveryCount("tokens", 100), [KeepAll()]), history)
    assert [2, 4] == [saved.record.step for saved in timeline.checkpoints]
    with pytest.raises(
        ObservationError,
        match=r"saves when loss \(min\) improves, and the metrics have no column .loss. \(have: tokens\)",
    ):
        simulate(Policy(OnImprovement("loss", mode="min"), [KeepAll()]), history)
