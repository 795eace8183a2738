"""Triggers are due at crossings since the last due observation, and say how far ahead nothing is."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

import pytest

from checkpointer.errors import PolicyError
from checkpointer.policy.schedule import Schedule
from checkpointer.policy.triggers import (
    ALWAYS,
    AnyOf,
    AtSteps,
    DuringEpochs,
    EveryEpochs,
    EverySeconds,
    EverySteps,
    Horizon,
    SupportsHorizon,
    Trigger,
    horizon_of,
)
from checkpointer.records.record import Progress
from checkpointer.testing import FakeClock


def due_steps(trigger: Trigger, steps: range) -> list[int]:
    """Return the steps at which a loop that reports ``steps`` finds the trigger due."""
    since, due = Progress(), []
    for step in steps:
        now = Progress(step=step)
        if trigger.due(now, since):
            since = now
            due.append(step)
    return due


@pytest.mark.parametrize(
    ("trigger", "reported", "expected"),
    [
        (EverySteps(10), range(1, 41), [10, 20, 30, 40]),
        (EverySteps(10), range(41), [10, 20, 30, 40]),
        (EverySteps(1), range(1, 4), [1, 2, 3]),
        (EverySteps(10), range(2, 42, 2), [10, 20, 30, 40]),
        (EverySteps(10), range(7, 50, 7), [14, 21, 35, 42]),
        (EverySteps(5), range(7, 30, 7), [7, 14, 21, 28]),
        (EverySteps(10), range(35, 50, 5), [35, 40]),
        (EverySteps(10, after=10), range(1, 41), [20, 30, 40]),
        (EverySteps(10, after=15), range(1, 41), [20, 30, 40]),
        (EverySteps(10, after=9), range(1, 41), [10, 20, 30, 40]),
        (AtSteps(3, 20, 5), range(1, 41), [3, 5, 20]),
        (AtSteps(3, 5, 20), range(7, 50, 7), [7, 21]),
        (AtSteps(), range(1, 41), []),
        (AtSteps(0), range(3), []),
        (AnyOf(EverySteps(10), AtSteps(3)), range(1, 22), [3, 10, 20]),
        (AnyOf(), range(1, 22), []),
    ],
)
def test_step_triggers_count_crossings(trigger: Trigger, reported: range, expected: list[int]) -> None:
    """However a loop strides, each multiple that was crossed makes one observation due."""
    assert expected == due_steps(trigger, reported)


def test_a_resumed_run_goes_on_counting_from_its_checkpoint() -> None:
    """The last due observation is an argument, so a restart changes nothing."""
    assert EverySteps(10).due(Progress(step=29), Progress(step=25)) is None
    assert "step 30 reached a multiple of 10" == EverySteps(10).due(Progress(step=30), Progress(step=25))


@pytest.mark.parametrize(
    ("trigger", "expected"),
    [
        (EveryEpochs(1), [1, 2, 3, 4, 5, 6]),
        (EveryEpochs(2), [2, 4, 6]),
        (EveryEpochs(2, after=2), [4, 6]),
        (EveryEpochs(2, after=3), [4, 6]),
        (EveryEpochs(3, after=1), [3, 6]),
    ],
)
def test_epoch_triggers_are_due_at_the_end_of_every_nth(trigger: Trigger, expected: list[int]) -> None:
    """Within an epoch nothing is due; at its end the count decides."""
    since, due = Progress(), []
    for half in range(13):
        now = Progress(epochs=half // 2, step=half)
        if trigger.due(now, since):
            since = now
            due.append(now.epochs)
    assert expected == due


@pytest.mark.parametrize(
    ("n", "reported", "expected"),
    [(1, [1, 1, 2], [1, 1, 2]), (2, [1, 2, 2, 3, 4], [2, 2, 4]), (2, [3, 6], [6]), (3, [0], [])],
)
def test_during_epochs_asks_of_each_report_whether_its_epoch_counts(
    n: int, reported: list[int], expected: list[int]
) -> None:
    """As often as an epoch is reported, and never to make up for one that was missed; its horizon hides none."""
    trigger, since, due = DuringEpochs(n), Progress(), []
    for epochs in reported:
        now = Progress(epochs=epochs)
        if trigger.due(now, since):
            assert not trigger.horizon(since).covers(0, now.epochs, epoch_end=False)
            since = now
            due.append(epochs)
    assert expected == due


@pytest.mark.parametrize(
    ("step", "epoch", "epoch_end", "time", "expected"),
    [
        (9, 1, False, 4.0, True),
        (9, 0, True, 4.0, True),
        (10, 1, False, 4.0, False),
        (9, 1, True, 4.0, False),
        (9, 0, None, 4.0, False),
        (9, 1, False, 5.0, False),
    ],
)
def test_a_horizon_covers_what_is_below_all_its_bounds(
    step: int, epoch: int, epoch_end: bool | None, time: float, expected: bool
) -> None:
    """One bound reached is enough to ask, and so is an epoch that may end. The manager's fast path agrees."""
    clock, schedule = FakeClock(time), Schedule(AnyOf(EverySteps(10), EveryEpochs(2), EverySeconds(5)))
    schedule.go_on(Progress(), 0.0)
    assert expected is schedule.horizon.covers(step, epoch, epoch_end, clock)
    assert expected is schedule.is_quiet({}, step, epoch, epoch_end, clock)


def test_three_short_runs_save_under_a_long_interval() -> None:
    """The time trigger survives restarts: the clock runs on from the first start."""
    trigger = EverySeconds(1)
    start = Progress(time=100.0)
    assert [False, True, True] == [bool(trigger.due(Progress(time=100 + 0.7 * run), start)) for run in (1, 2, 3)]


def test_a_clock_that_was_set_back_is_due() -> None:
    """A day's correction must not stop the saves for a day."""
    reason = EverySeconds(3600).due(Progress(time=50.0), Progress(time=100.0))
    assert "the clock went back by 50 s" == reason


def test_seconds_may_be_a_timedelta() -> None:
    """Both ways of saying half an hour are one value."""
    assert EverySeconds(1800) == EverySeconds(timedelta(minutes=30))


def test_zero_seconds_is_always_due() -> None:
    """An interval of 0 takes every observation, at the very same time too."""
    assert EverySeconds(0).due(Progress(time=5.0), Progress(time=5.0))


def test_any_of_gives_every_reason() -> None:
    """The log shows each trigger that fired."""
    reason = AnyOf(EverySteps(10), EverySeconds(5)).due(Progress(step=10, time=6.0), Progress())
    assert "step 10 reached a multiple of 10; 6 s passed, every 5 s" == reason


@pytest.mark.parametrize(
    ("trigger", "expected"),
    [
        (EverySteps(10), Horizon(step=30)),
        (EverySteps(10, after=45), Horizon(step=50)),
        (EveryEpochs(2), Horizon(epochs=4)),
        (EverySeconds(60), Horizon(time=160.0)),
        (AtSteps(5, 40), Horizon(step=40)),
        (AtSteps(5), Horizon()),
        (AnyOf(EverySteps(10), EverySeconds(60)), Horizon(step=30, time=160.0)),
        (AnyOf(), Horizon()),
    ],
)
def test_horizons(trigger: SupportsHorizon, expected: Horizon) -> None:
    """Each trigger says below which step, epoch and time nothing is due."""
    assert expected == trigger.horizon(Progress(step=25, epochs=3, time=100.0))


class OwnTrigger:
    """A user's trigger with the one method that is asked for."""

    def due(self, now: Progress, since: Progress) -> str | None:
        """See `Trigger.due`."""
        return "odd" if now.step % 2 else None


def test_a_trigger_without_horizon_is_always_asked() -> None:
    """A user's own trigger needs one method, alone and in a composition."""
    assert ALWAYS == horizon_of(OwnTrigger(), Progress())
    assert -math.inf == AnyOf(EverySteps(10), OwnTrigger()).horizon(Progress()).step
    assert [1, 3, 4, 5] == due_steps(AnyOf(EverySteps(4), OwnTrigger()), range(1, 6))


@pytest.mark.parametrize(
    ("trigger", "expected"),
    [
        (EverySteps(10), "every 10 steps"),
        (EverySteps(10, after=5), "every 10 steps after step 5"),
        (EveryEpochs(2, after=1), "every 2 epochs after 1 epoch"),
        (EverySeconds(90.5), "every 90.5 s"),
        (AtSteps(20, 3), "at steps 3, 20"),
        (AtSteps(), "never"),
        (DuringEpochs(2), "at each report of every 2 epochs"),
        (AnyOf(EverySteps(10), EverySeconds(60)), "every 10 steps or every 60 s"),
        (AnyOf(), "never"),
    ],
)
def test_triggers_print_as_text(trigger: Trigger, expected: str) -> None:
    """A trigger prints as the text that decisions use."""
    assert expected == str(trigger)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (EverySteps, (0,), "EverySteps.n is 0; expected a whole number of at least 1"),
        (EverySteps, (True,), "EverySteps.n is True"),
        (EverySteps, (2.5,), "EverySteps.n is 2.5"),
        (EveryEpochs, (-1,), "EveryEpochs.n is -1"),
        (EverySeconds, (-1,), "the interval of the trigger is -1; expected seconds of at least 0"),
        (EverySeconds, (math.inf,), "the interval of the trigger is inf"),
        (EverySeconds, (math.nan,), "the interval of the trigger is nan"),
        (EverySeconds, (timedelta(seconds=-1),), "the interval of the trigger is -1.0"),
        (EverySeconds, ("1h",), "the interval of the trigger is '1h'"),
        (AtSteps, (-5,), "AtSteps has -5"),
        (AtSteps, (1.0,), "AtSteps has 1.0"),
        (AnyOf, (10,), "AnyOf has 10; expected triggers"),
        (AnyOf, (EverySteps,), "AnyOf has <class"),
    ],
)
def test_a_trigger_that_means_nothing_is_refused(make: Any, arguments: tuple[Any, ...], message: str) -> None:
    """The error names the argument, the value and what was expected."""
    with pytest.raises(PolicyError, match=message):
        make(*arguments)


def test_after_is_checked_too() -> None:
    """A warm-up below zero means nothing."""
    with pytest.raises(PolicyError, match=r"EverySteps\.after is -1; expected a whole number of at least 0"):
        EverySteps(1, after=-1)
