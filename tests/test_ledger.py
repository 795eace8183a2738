"""What a ledger remembers, what that costs however many records there are, and what must not be believed."""

from __future__ import annotations

import gc
import math
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
from support.factories import history, manifest, record

from checkpointer import CheckpointManager, EverySteps, KeepAll, KeepBest, KeepEvery, KeepLast, Manifest, Policy
from checkpointer.commit.index import record_path
from checkpointer.errors import ObservationError
from checkpointer.policy.decide import surplus
from checkpointer.policy.ledger import Ledger
from checkpointer.policy.ordered import WIDTH, Ordered
from checkpointer.policy.reasons import kept_by
from checkpointer.policy.retention import Budget, Rule
from checkpointer.ports import Stat
from checkpointer.records.record import Record
from checkpointer.storage import MemoryStorage

EACH = EverySteps(1)


@pytest.mark.parametrize("place", [0, -1, 5])
def test_a_place_that_is_not_there_is_an_error(place: int) -> None:
    """As in a list."""
    with pytest.raises(IndexError):
        Ordered[int]()[place]


def test_a_sorted_sequence_stays_low() -> None:
    """However many items came, and went again: as deep as the logarithm of those that are there."""
    tree = Ordered[int]()
    for n in range(20_000):
        tree = tree.put((n * 7919 % 20_011,), n)
    assert depth(tree) <= 1 + math.log(20_000, WIDTH / 2)
    for n in range(20_000):
        if n % 100:
            tree = tree.drop((n * 7919 % 20_011,))
    assert 200 == len(tree)
    assert depth(tree) <= 1 + math.log(200, WIDTH / 4)


def depth(tree: Ordered[Any]) -> int:
    """Return how many nodes lie above an item."""
    node, levels = tree._root, 1
    while node.counts is not None:
        node, levels = node.children[0], levels + 1
    return levels


class KeepOdd:
    """A rule of one's own, which knows nothing of ledgers."""

    def keep(self, history: Any) -> dict[str, str]:
        return {record.name: "odd" for record in history if record.step % 2}


MANY: dict[str, list[Rule]] = {
    "all": [KeepAll()],
    "ranked": [KeepBest(10**6, "loss", mode="min"), KeepLast(2)],
    "each a half": [KeepEvery(steps=2), KeepLast(10**6)],
    "by time": [KeepEvery(seconds=1), KeepBest(2, "loss", mode="min")],
    "pinned": [KeepLast(3)],
    "incumbents": [KeepAll(), KeepBest(2, "loss", mode="min", ties="incumbent")],
}


@pytest.mark.parametrize("keep", MANY.values(), ids=MANY)
def test_a_save_asks_about_few_of_many(keep: list[Any]) -> None:
    """With 64 times as many that live, a save of a manager makes hardly more calls, whatever the rules."""
    few, many = (calls_of_a_save(keep, count) for count in (125, 8000))
    assert many < few * 1.5, f"{few} calls with 125 that live, {many} with 8000"


def test_a_save_over_budget_asks_about_few_of_many() -> None:
    """The worst go until the budget holds, and nobody looks at all the others."""
    best = KeepBest(3, "loss", mode="min")
    few, many = (calls_of_a_save([KeepAll(), best, Budget(bytes=1000 * count)], count) for count in (125, 8000))
    assert many < few * 1.5, f"{few} calls with 125 that live, {many} with 8000"


def test_a_rule_of_ones_own_is_asked_about_all() -> None:
    """It sees the whole history each time; counting calls does notice."""
    few, many = (calls_of_a_save([KeepAll(), KeepOdd()], count) for count in (125, 8000))
    assert many > few * 10


def test_a_declined_observation_asks_about_few_of_many() -> None:
    """Nothing is committed that could remember what was found out, and still it is found out only once."""
    few, many = (calls_of_a_declined(count) for count in (125, 8000))
    assert many < few * 1.5, f"{few} calls with 125 that live, {many} with 8000"


def calls_of_a_declined(count: int) -> int:
    """Return how many functions the second report calls that is not good enough."""
    manager = of_many([KeepBest(count, "loss", mode="min")], count, last=None)
    manager.observe({"loss": 99.0}, step=count + 1, epoch=0, epoch_end=False)
    calls = counted(lambda: manager.observe({"loss": 99.0}, step=count + 2, epoch=0, epoch_end=False))
    assert count == len(manager.records)
    manager.close()
    return calls


def test_the_first_save_goes_through_all_once() -> None:
    """With the ties of Lightning, where who has a place depends on who came when: n log n, and not each by each."""
    rule = KeepBest(10**6, "loss", mode="min", ties="incumbent")
    few, many = (calls_of_a_save([rule], count, warm=0) for count in (125, 2000))
    assert many < few * 32, f"{few} calls with 125 that live, {many} with 2000"


def calls_of_a_save(keep: list[Any], count: int, *, warm: int = 3) -> int:
    """Return how many functions a save calls in all, that many checkpoints being on record."""
    manager = of_many(keep, count)
    for n in range(1, warm + 1):
        manager.observe({"loss": 9.0}, step=count + n, epoch=0, epoch_end=False)
    calls = counted(lambda: manager.observe({"loss": 9.0}, step=count + warm + 1, epoch=0, epoch_end=False))
    assert len(manager.records) >= count * 0.9
    manager.close()
    return calls


class Pretending(MemoryStorage):
    """Says of very many files that they are there, without going through all that are."""

    def __init__(self) -> None:
        super().__init__()
        self.pretended: set[str] = set()

    def list(self, prefix: str = "") -> dict[str, Stat]:
        return {prefix: Stat(1000, "")} if prefix in self.pretended else super().list(prefix)


def of_many(keep: list[Any], count: int, *, last: Any = "copy") -> CheckpointManager:
    """Return a manager of that many checkpoints, of which no payload is there."""
    storage = Pretending()
    manager = CheckpointManager(storage, Policy(EACH, keep, last=last), state=lambda: {"w": 1}, run="run-a")
    is_pinned = keep == MANY["pinned"]
    records = [
        record(f"epoch=0-step={n}.ckpt", step=n, epoch=0, metrics={"loss": n % 7}, size=1000, time=n, pinned=is_pinned)
        for n in range(1, count + 1)
    ]
    storage.pretended = {path for one in records for path in (one.name, record_path(one.name))}
    manager._directory.manifest = attrs.evolve(manager.session.manifest, records=records)
    return manager


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


def test_one_thread_may_ask_while_another_hands_on() -> None:
    """The writer of saves in the background and the loop share ledgers."""
    ledger, stop, failures = Ledger(record(step=n) for n in range(1, 300)), threading.Event(), []

    def ask() -> None:
        try:
            k = 1
            while not stop.is_set():
                KeepBest(k, "step", mode="max").best(ledger)
                ledger.where(_After(k))
                k = k % 50 + 1
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    for step in range(300, 500):
        ledger = ledger.changed(come=[record(step=step)])
    stop.set()
    thread.join()
    assert [] == failures
    assert 499 == len(ledger) == len(ledger.by(KeepBest(1, "step", mode="max")))


@attrs.frozen
class _After:
    step: int

    def __call__(self, one: Record) -> bool:
        return one.step > self.step


# What must not be believed


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
def test_what_a_rule_has_from_another_is_asked_about_again(rule: Any) -> None:
    """It may have it from yet another one the next time, or of other records: whoever lost its place goes."""
    with CheckpointManager(None, Policy(EACH, [rule]), state=lambda: {"w": 1}) as manager:
        for step in range(1, 31):
            manager.observe({"loss": 1.0}, step=step, epoch=step // 12, epoch_end=False)
            assert () == surplus(
                manager.policy, attrs.evolve(manager.session.manifest, records=tuple(manager.session.manifest.records))
            )


def f1(metrics: Mapping[str, float]) -> float:
    """Return a score that fails on what a diverged model measures."""
    return 2 * metrics["p"] * metrics["r"] / (metrics["p"] + metrics["r"])


@pytest.mark.parametrize("ties", ["older", "incumbent"])
def test_a_score_that_fails_on_a_rescue_costs_nothing(tmp_path: Path, ties: Any) -> None:
    """A rescue is ranked by nobody, so nobody need work its score out; it is told of and mirrored like any other."""
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


# What must not pile up


def test_what_nobody_asks_for_any_more_is_forgotten() -> None:
    """A score made anew at each step is not held for the rest of the training."""
    with CheckpointManager(None, Policy(EACH, [KeepLast(3)]), state=lambda: {"w": 1}) as manager:
        scores = []
        for step in range(1, 40):
            manager.observe({"loss": 1.0}, step=step, epoch=0, epoch_end=False)

            def score(metrics: Mapping[str, float]) -> float:
                return metrics["loss"]

            scores.append(weakref.ref(score))
            KeepBest(1, score, mode="min").best(manager.session.manifest.history)
        del score
        gc.collect()
        assert sum(one() is not None for one in scores) < 10


def test_what_is_retired_is_not_held() -> None:
    """Neither the ledgers of long ago, nor the records that only they had."""
    with CheckpointManager(None, Policy(EACH, [KeepLast(3)]), state=lambda: {"w": 1}) as manager:
        ledgers = []
        for step in range(1, 40):
            manager.observe({"loss": 1.0}, step=step, epoch=0, epoch_end=False)
            ledgers.append(weakref.ref(manager.session.manifest.records))
        gc.collect()
        assert sum(one() is not None for one in ledgers) <= 2


def test_a_run_that_goes_back_again_and_again_remembers_the_last_few_lines() -> None:
    """What was found out for a line that the run has left for good is not handed on."""
    seen = manifest()
    number = 0
    most = 0
    for fork in range(60):
        for step in range(1, 5):
            number += 1
            seen = seen.with_record(record(f"n{number}", step=fork + step, line=seen.line, serial=number))
            seen = seen.without(*surplus(Policy(EACH, [KeepLast(3)]), seen))
        seen = seen.resumed_at(seen.history[-2])
        most = max(most, findings(seen))
    assert most < 60


def findings(seen: Manifest) -> int:
    """Return how much is remembered, of parts of parts too."""

    def count(ledger: Ledger) -> int:
        parts = [found.value for found in ledger._found.values() if isinstance(found.value, Ledger)]
        return len(ledger._found) + sum(map(count, parts))

    return count(seen.records)


class AfterStep(KeepBest):
    """Has something of its own that its equality does not know of."""

    first: int = 0

    def ranks(self, record: Record) -> bool:
        return record.step >= self.first


def after_step(first: int) -> AfterStep:
    """Return a rule that compares equal to the others."""
    rule = AfterStep(1, "loss", mode="min")
    object.__setattr__(rule, "first", first)
    return rule


def test_rules_that_only_seem_equal_are_not_taken_for_each_other() -> None:
    """What derives from a rule of ours may well be equal to another and keep something else."""
    rules = [after_step(0), after_step(3)]
    assert rules[0] == rules[1]
    kept = kept_by(rules, [], history(1, 2, 4, 3), None)
    assert {"s2", "s3"} == kept.unkept


def test_a_ledger_counts_its_bytes_whatever_it_is_told() -> None:
    """Somebody is told to go twice, or comes in the place of somebody."""
    one, two = history(1, 2)
    ledger = Ledger([one, two])
    assert 10 == ledger.changed(gone=[one, one]).bytes
    assert 35 == ledger.changed(come=[attrs.evolve(two, size=25)]).bytes


def test_a_score_that_fails_is_asked_for_once_or_twice_and_not_by_every_question() -> None:
    """An order that cannot be handed on is worked out anew, and says so if that fails as well."""
    asked = 0

    def counting(metrics: Mapping[str, float]) -> float:
        nonlocal asked
        asked += 1
        return 1 / metrics["loss"]

    policy = Policy(EACH, [KeepBest(300, counting, mode="max"), KeepLast(1)])
    seen = manifest(history(*range(1, 301)))
    assert () == surplus(policy, seen)
    asked = 0
    with pytest.raises(ObservationError, match="division by zero"):
        surplus(policy, seen.with_record(record(step=301, metrics={"loss": 0.0})))
    assert asked < 300 * 5


def test_a_record_whose_score_fails_is_in_nobodys_way_once_it_is_mended_or_gone() -> None:
    """What would fail for the ledger before is asked of this one."""
    policy = Policy(EACH, [KeepBest(1, f1, mode="max"), KeepLast(1)])
    scores = [0.5, 0.0, 0.4]
    seen = manifest([record(step=n, metrics={"p": p, "r": p}) for n, p in enumerate(scores, start=1)])
    assert () == surplus(policy, seen.without("s2"))
    mended = seen.with_record(record(step=2, metrics={"p": 0.9, "r": 0.9}))
    assert ("s1",) == surplus(policy, mended)
