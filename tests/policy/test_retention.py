"""Tables of history in, names kept, per rule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import pytest
from support.factories import history, manifest, record

from checkpointer import EverySteps, Policy, explain
from checkpointer.errors import PolicyError
from checkpointer.policy.ranking import Metric, Ranking
from checkpointer.policy.retention import Budget, KeepAll, KeepBest, KeepEvery, KeepLast, Rule
from checkpointer.records.record import Record

nan, inf = math.nan, math.inf
LOSS = Metric("loss", mode="min")


@pytest.mark.parametrize(
    ("rule", "losses", "expected"),
    [
        (KeepLast(1), (), []),
        (KeepLast(1), (1, 2, 3), ["s3"]),
        (KeepLast(2), (1, 2, 3), ["s2", "s3"]),
        (KeepLast(9), (1, 2, 3), ["s1", "s2", "s3"]),
        (KeepLast(2), (None, None, nan), ["s2", "s3"]),
        (KeepAll(), (1, None, nan), ["s1", "s2", "s3"]),
        (KeepBest(1, "loss", mode="min"), (), []),
        (KeepBest(1, "loss", mode="min"), (3, 1, 2), ["s2"]),
        (KeepBest(2, "loss", mode="min"), (3, 1, 2), ["s2", "s3"]),
        (KeepBest(1, "loss", mode="max"), (3, 1, 2), ["s1"]),
        (KeepBest(2, "loss", mode="min"), (1, nan), ["s1", "s2"]),
        (KeepBest(2, "loss", mode="min"), (nan, 1, 2), ["s2", "s3"]),
        (KeepBest(2, "loss", mode="min"), (nan, nan, 1), ["s1", "s3"]),
        (KeepBest(2, "loss", mode="min"), (None, 1, None), ["s2"]),
        (KeepBest(2, "loss", mode="min"), (None, None), []),
        (KeepBest(1, "loss", mode="min"), (-inf, 5), ["s2"]),
        (KeepBest(1, "loss", mode="max"), (inf, 5), ["s2"]),
        (KeepBest(1, "loss", mode="min"), (nan, -inf), ["s2"]),
        (KeepBest(1, "loss", mode="min"), (nan, inf), ["s2"]),
        (KeepBest(1, "loss", mode="min"), (1, 1), ["s1"]),
        (KeepBest(1, "loss", mode="min", ties="newest"), (1, 1), ["s2"]),
        (KeepBest(2, "loss", mode="min", ties="incumbent"), (1, 1, 1), ["s1", "s2"]),
        (KeepBest(2, "loss", mode="min", ties="incumbent"), (1, 1, 0), ["s2", "s3"]),
        (KeepBest(2, "loss", mode="min", ties="incumbent"), (1, None, math.nan, math.nan, 2), ["s1", "s5"]),
        (KeepBest(1, "loss", mode="min", after_step=1), (1, 5, 4), ["s3"]),
        (KeepBest(1, "loss", mode="min", after_step=3), (1, 5, 4), []),
        (KeepEvery(steps=2), (1, 1, 1, 1, 1), ["s2", "s4"]),
        (KeepEvery(steps=9), (1, 1), []),
        (KeepEvery(epochs=3), (1, 1, 1, 1, 1), ["s2", "s5"]),
        (KeepEvery(seconds=2), (1, 1, 1, 1, 1), ["s1", "s3", "s5"]),
        (KeepEvery(seconds=timedelta(seconds=3)), (1, 1, 1, 1, 1), ["s1", "s4"]),
        (KeepEvery(seconds=inf), (1, 1, 1), ["s1"]),
    ],
)
def test_what_a_rule_keeps(rule: Rule, losses: Sequence[float | None], expected: list[str]) -> None:
    """Records s1, s2, ... with these losses, one step, epoch and second apart."""
    assert expected == sorted(rule.keep(history(*losses)))


@pytest.mark.parametrize(
    ("steps", "expected"),
    [([7, 14, 21, 28], ["s14", "s21"]), ([5, 35, 36, 41], ["s35", "s41"]), ([10, 20], ["s10", "s20"]), ([0, 9], [])],
)
def test_keep_every_takes_the_first_at_or_past_a_multiple(steps: list[int], expected: list[str]) -> None:
    """Steps that miss the multiples are thinned as evenly as those that hit them."""
    assert expected == sorted(KeepEvery(steps=10).keep([record(step=step) for step in steps]))


def test_keep_every_does_not_change_its_mind() -> None:
    """What is retired in between changes nothing: the kept ones stay the first of their interval."""
    rule, full = KeepEvery(steps=3), history(*[1.0] * 12)
    kept: list[Record] = []
    for one in full:
        names = rule.keep([*kept, one])
        kept = [r for r in [*kept, one] if r.name in names]
    assert list(rule.keep(full)) == [r.name for r in kept]


def test_reasons_say_the_rank() -> None:
    """The reason says which place a record has, and by what."""
    assert {
        "s2": "#1 of the best 2 by loss (min) after step 1",
        "s3": "#2 of the best 2 by loss (min) after step 1",
    } == KeepBest(2, "loss", mode="min", after_step=1).keep(history(0, 1, 2, 3))
    assert {"s1": "one every 60 s"} == KeepEvery(seconds=60).keep(history(1))
    assert {"s1": "everything"} == KeepAll().keep(history(1))


def test_a_list_of_rules_is_their_union() -> None:
    """A record is kept while any rule keeps it, and has the reason of each."""
    policy = Policy(EverySteps(1), [KeepBest(1, "loss", mode="min"), KeepLast(1)])
    kept = explain(policy, manifest(history(1, 3, 2)))
    assert {"s1": ("the best by loss (min)",), "s3": ("the newest",)} == kept
    both = explain(policy, manifest(history(3, 1)))
    assert {"s2": ("the best by loss (min)", "the newest")} == both


@pytest.mark.parametrize(
    ("size", "losses", "expected"),
    [
        (100, (1, 2, 3), []),
        (30, (1, 2, 3), []),
        (29, (2, 1, 4, 3), ["s1", "s3"]),
        (20, (1, 3, 2, 9), ["s2", "s3"]),
        (10, (1, 3, 2, 9), ["s2", "s3"]),
        (1, (1, 2), []),
        (25, (None, 1, None, 2), ["s1", "s3"]),
        (20, (nan, 1, 2, 3), ["s1", "s3"]),
        (10, (3, 2, 1), ["s1", "s2"]),
        (10, (), []),
    ],
)
def test_a_budget_drops_the_worst_first(size: int, losses: Sequence[float | None], expected: list[str]) -> None:
    """Records of 10 bytes each: never the newest, never the best, unranked before ranked."""
    assert expected == sorted(Budget(bytes=size).drop(history(*losses), LOSS))


def test_a_budget_without_ranking_drops_the_oldest() -> None:
    """With nothing to rank by, age decides."""
    assert ["s1", "s2"] == list(Budget(bytes=20).drop(history(1, 2, 3, 4), None))


def test_a_budget_spares_the_pinned_but_counts_them() -> None:
    """A pinned checkpoint takes room, and another goes for it."""
    records = [record(step=1, pinned=True), record(step=2), record(step=3)]
    assert ["s2"] == list(Budget(bytes=20).drop(records, None))


def test_a_budget_spares_the_best_that_the_rule_ranks() -> None:
    """A better value from the warm-up is not the best, and cannot take its protection."""
    rule = KeepBest(1, "loss", mode="min", after_step=1)
    kept = explain(Policy(EverySteps(1), [rule, KeepAll(), Budget(bytes=20)]), manifest(history(0, 1, 2, 3)))
    assert {"s2", "s4"} == kept.keys()


class DropAll:
    """A user's limit that wants everything gone, and what is not there too."""

    def drop(self, kept: Sequence[Record], ranking: Ranking | None) -> Mapping[str, str]:
        """See `Limit.drop`."""
        return {record.name: "gone" for record in kept} | {"never-there": "gone"}


def test_no_limit_drops_a_pinned_record() -> None:
    """A pinned checkpoint is kept whatever a user's own limit says."""
    records = [record(step=1, pinned=True), record(step=2)]
    kept = explain(Policy(EverySteps(1), [KeepAll(), DropAll()]), manifest(records))
    assert {"s1": ("everything", "pinned")} == kept


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (KeepLast, {"n": 0}, "KeepLast.n is 0; expected a whole number of at least 1"),
        (KeepBest, {"k": 0, "metric": "a", "mode": "min"}, "KeepBest.k is 0"),
        (KeepBest, {"k": 1, "metric": "a", "mode": "best"}, "mode is 'best'; expected 'min' or 'max'"),
        (KeepBest, {"k": 1, "metric": "a", "mode": "min", "after_step": -1}, "KeepBest.after_step is -1"),
        (KeepEvery, {}, "KeepEvery got nothing; pass exactly one"),
        (KeepEvery, {"steps": 1, "epochs": 1}, "KeepEvery got steps and epochs; pass exactly one"),
        (KeepEvery, {"steps": 0}, "KeepEvery.steps is 0"),
        (KeepEvery, {"seconds": 0}, "the interval of the rule is 0; expected more than 0"),
        (KeepEvery, {"seconds": nan}, "the interval of the rule is nan"),
        (Budget, {"bytes": 0}, "Budget.bytes is 0"),
        (Budget, {"bytes": 1e9}, "Budget.bytes is 1000000000.0"),
    ],
)
def test_a_rule_that_means_nothing_is_refused(make: Any, arguments: dict[str, Any], message: str) -> None:
    """The error names the argument, the value and what was expected."""
    with pytest.raises(PolicyError, match=message):
        make(**arguments)


def test_keep_every_seconds_goes_on_after_the_clock_was_set_back() -> None:
    """It begins anew there, and what it kept before stays; thinning the result again changes nothing."""
    records = [record(step=step, time=time) for step, time in enumerate([100, 150, 200, 40, 90, 140, 230], start=1)]
    kept = KeepEvery(seconds=100).keep(records)
    assert ["s1", "s3", "s4", "s6"] == list(kept)
    assert kept == KeepEvery(seconds=100).keep([r for r in records if r.name in kept])


def test_a_whole_metric_says_the_direction_itself() -> None:
    """As a config file writes it; said twice it could be said in two ways."""
    metric = Metric("loss", mode="min", ties="newest")
    assert KeepBest(2, "loss", mode="min", ties="newest") == KeepBest(2, metric)
    with pytest.raises(PolicyError, match="mode='max', ties='older'; say these in the Metric alone"):
        KeepBest(2, metric, mode="max")  # type: ignore[call-overload]


def test_who_keeps_a_place_among_equals_follows_from_what_is_there() -> None:
    """Of three equals the first lost its place to a better one. With it gone, its place would have been the third's."""
    rule = KeepBest(2, "loss", mode="min", ties="incumbent")
    one, two, three, better = history(2, 2, 2, 1)
    assert ["s2", "s4"] == sorted(rule.keep([one, two, three, better]))
    assert ["s3", "s4"] == sorted(rule.keep([two, three, better]))
