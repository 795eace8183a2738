"""Rules and scores of one's own: the whole history is an argument, and nothing is remembered between two saves."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
from support.factories import history, manifest, record

from checkpointer import CheckpointManager, EverySteps, KeepAll, KeepBest, KeepEvery, KeepLast, Policy
from checkpointer.errors import ObservationError
from checkpointer.policy.decide import surplus
from checkpointer.policy.retention import Budget
from checkpointer.records.record import Record

EACH = EverySteps(1)


class LastOfEpoch:
    """Delegates to a rule of ours, of fewer records each time an epoch begins."""

    def keep(self, history: Sequence[Record]) -> Mapping[str, str]:
        return KeepLast(3).keep([one for one in history if one.epoch == history[-1].epoch])


class FewerLater:
    """Delegates to another rule of ours when it gets late."""

    def keep(self, history: Sequence[Record]) -> Mapping[str, str]:
        return KeepLast(5 if history[-1].step < 10 else 1).keep(history)


class EveryOther(KeepLast):
    """Asks the rule it derives from about every other record."""

    def keep(self, history: Sequence[Record]) -> Mapping[str, str]:
        return super().keep(history[::2])


@pytest.mark.parametrize("rule", [LastOfEpoch(), FewerLater(), EveryOther(2)], ids=lambda rule: type(rule).__name__)
def test_a_rule_may_ask_another_one_about_other_records_each_time(rule: Any) -> None:
    """After each save the checkpoints are gone that the rule does not keep any more."""
    with CheckpointManager(None, Policy(EACH, [rule]), state=lambda: {"w": 1}) as manager:
        for step in range(1, 31):
            manager.observe({"loss": 1.0}, step=step, epoch=step // 12, epoch_end=False)
            assert () == surplus(manager.policy, manager.session.manifest)


class Extravagant:
    """Names checkpoints that do not exist."""

    def keep(self, history: Sequence[Record]) -> Mapping[str, str]:
        return {"never-there": "dreamt"}


def test_a_rule_may_name_what_is_not_there() -> None:
    """The name is ignored."""
    assert ("s1", "s2") == surplus(Policy(EACH, [Extravagant()]), manifest(history(1, 2)))


def f1(metrics: Mapping[str, float]) -> float:
    """Return a score that fails on what a diverged model measures."""
    return 2 * metrics["p"] * metrics["r"] / (metrics["p"] + metrics["r"])


@pytest.mark.parametrize("ties", ["older", "incumbent"])
def test_a_score_that_fails_on_a_rescue_costs_nothing(tmp_path: Path, ties: Any) -> None:
    """A rescue is never ranked, so its score is not computed; it is reported and mirrored like any other."""
    policy = Policy(EverySteps(10), [KeepBest(3, f1, mode="max", ties=ties), KeepLast(1)])
    here, there = tmp_path / "here", tmp_path / "there"
    manager = CheckpointManager(here, policy, state=lambda: {"w": 1}, mirror=there)
    for step in range(1, 31):
        manager.observe({"p": 0.5, "r": 0.5}, step=step, epoch=0, epoch_end=False)
    manager.observe({"p": 0.0, "r": 0.0}, step=35, epoch=0, epoch_end=False)
    assert manager.rescue("SIGTERM")
    manager.close()
    assert (there / "rescue-step=35.ckpt").exists()
    with CheckpointManager(here, policy, state=lambda: {"w": 1}) as again:
        restored = again.restore()
        assert restored is not None
        assert 35 == restored.record.step
        assert again.observe({"p": 0.9, "r": 0.9}, step=40, epoch=0, epoch_end=False)


def test_a_score_that_depends_on_more_than_metrics_ranks_nothing_that_is_gone() -> None:
    """It must not, but if it does: what was retired is not called the best."""
    sign = 1.0

    def moody(metrics: Mapping[str, float]) -> float:
        return sign * metrics["loss"]

    policy = Policy(EACH, [KeepBest(2, moody, mode="min"), KeepLast(1)])
    with CheckpointManager(None, policy, state=lambda: {"w": 1}) as manager:
        for step in range(1, 16):
            sign = 1.0 if step < 6 else -1.0
            manager.observe({"loss": float(step)}, step=step, epoch=0, epoch_end=False)
            assert manager.best in manager.records


@attrs.define
class _Score:
    """A score that has a name and cannot be hashed."""

    __name__ = "score"

    def __call__(self, metrics: Mapping[str, float]) -> float:
        return metrics["loss"]


def test_a_score_that_cannot_be_hashed_ranks_all_the_same() -> None:
    """What is remembered is remembered of this very rule."""
    rule = KeepBest(2, _Score(), mode="min")
    assert _Score() == _Score()
    with pytest.raises(TypeError, match="unhashable"):
        hash(rule)
    with CheckpointManager(None, Policy(EACH, [rule]), state=lambda: {"w": 1}) as manager:
        for step, loss in enumerate([3.0, 1.0, 2.0, 4.0], start=1):
            manager.observe({"loss": loss}, step=step, epoch=0, epoch_end=False)
        assert [2, 3] == [one.step for one in manager.records]


class AfterStep(KeepBest):
    """Has something of its own that its equality does not know of."""

    first: int = 0

    def eligible(self, records: Iterable[Record]) -> list[Record]:
        return [one for one in records if one.step >= self.first]


def after_step(first: int) -> AfterStep:
    """Return a rule that compares equal to the others."""
    rule = AfterStep(1, "loss", mode="min")
    object.__setattr__(rule, "first", first)
    return rule


def test_rules_that_only_seem_equal_are_not_taken_for_each_other() -> None:
    """A class derived from a rule may be equal to another rule and keep other records."""
    rules = [after_step(0), after_step(3)]
    assert rules[0] == rules[1]
    assert ("s2", "s3") == surplus(Policy(EACH, rules), manifest(history(1, 2, 4, 3)))


def test_a_score_that_fails_is_an_error_that_names_it() -> None:
    """It is not swallowed: what it would rank is not known."""

    def inverse(metrics: Mapping[str, float]) -> float:
        return 1 / metrics["loss"]

    policy = Policy(EACH, [KeepBest(300, inverse, mode="max"), KeepLast(1)])
    seen = manifest(history(*range(1, 301)))
    assert () == surplus(policy, seen)
    with pytest.raises(ObservationError, match="division by zero"):
        surplus(policy, seen.with_record(record(step=301, metrics={"loss": 0.0})))


def test_a_record_whose_score_fails_does_no_harm_once_it_is_mended_or_gone() -> None:
    """Only the scores of records that are there are computed."""
    policy = Policy(EACH, [KeepBest(1, f1, mode="max"), KeepLast(1)])
    scores = [0.5, 0.0, 0.4]
    seen = manifest([record(step=n, metrics={"p": p, "r": p}) for n, p in enumerate(scores, start=1)])
    assert () == surplus(policy, seen.without("s2"))
    mended = seen.with_record(record(step=2, metrics={"p": 0.9, "r": 0.9}))
    assert ("s1",) == surplus(policy, mended)


# What it costs

MANY: dict[str, list[Any]] = {
    "all": [KeepAll()],
    "ranked": [KeepBest(10**6, "loss", mode="min"), KeepBest(3, "acc", mode="max"), Budget(bytes=10**9)],
    "over budget": [KeepBest(10**6, "loss", mode="min"), Budget(bytes=1)],
    "each a half": [KeepEvery(steps=2), KeepLast(10**6)],
    "by time": [KeepEvery(seconds=1), KeepBest(2, "loss", mode="min")],
    "incumbents": [KeepAll(), KeepBest(10**6, "loss", mode="min", ties="incumbent")],
}


@pytest.mark.parametrize("keep", MANY.values(), ids=MANY)
def test_what_rules_cost_grows_with_the_number_of_records_and_not_with_its_square(keep: list[Any]) -> None:
    """With 16 times as many records there are about 16 times as many calls."""
    few, many = (calls_of(Policy(EACH, keep), count) for count in (125, 2000))
    assert many < few * 24, f"{few} calls with 125 records, {many} with 2000"


def calls_of(policy: Policy, count: int) -> int:
    """Return how many functions are called to work out what goes."""
    seen = manifest([record(step=n, metrics={"loss": n % 7, "acc": n}) for n in range(1, count + 1)])
    return counted(lambda: surplus(policy, seen))


def counted(do: Callable[[], object]) -> int:
    """Return how many calls are made, of Python functions and of others."""
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        do()
    finally:
        sys.setprofile(before)
    return calls
