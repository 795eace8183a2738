"""What a ledger hands on is what working it out anew would find, and costs no more however many records there are."""

from __future__ import annotations

import bisect
import math
import random
import sys
import threading
from collections.abc import Callable
from typing import Any

import attrs
import pytest
from factories import manifest, observation, record
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointer import CheckpointManager, EverySteps, KeepAll, KeepBest, KeepEvery, KeepLast, Policy
from checkpointer.deciding import decide, explain, surplus
from checkpointer.ledger import Ledger
from checkpointer.manifest import Manifest
from checkpointer.ordered import WIDTH, Ordered
from checkpointer.records import Record
from checkpointer.retention import Budget, Rule
from checkpointer.storage import MemoryStorage


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 200)), max_size=400), st.sets(st.integers(0, 200)))
def test_a_sorted_sequence_is_as_a_sorted_list(changes: list[tuple[bool, int]], first: set[int]) -> None:
    """Whatever came and went: places, ranks, both directions; and what it was made of is as it was."""
    tree, model = Ordered(((n,), n) for n in first), sorted(first)
    for comes, n in changes:
        before, was = tree, list(model)
        if comes:
            tree = tree.put((n,), n)
            model = sorted({*model, n})
        else:
            tree = tree.drop((n,))
            model = [other for other in model if other != n]
        assert was == list(before)
    assert (len(model), model, model[::-1]) == (len(tree), list(tree), list(reversed(tree)))
    for n in range(-1, 202):
        assert bisect.bisect_left(model, n) == tree.rank((n,))
        assert (n if n in model else None) == tree.get((n,))
    for place in range(len(model)):
        assert (model[place], model[-place - 1]) == (tree[place], tree[-place - 1])
        assert model[place:] == list(tree.starting_at(place))


@pytest.mark.parametrize("place", [0, -1, 5])
def test_a_place_that_is_not_there_is_an_error(place: int) -> None:
    """As in a list."""
    with pytest.raises(IndexError):
        Ordered[int]()[place]


def test_a_sorted_sequence_stays_low() -> None:
    """100 000 items lie at most five nodes deep, and a tenth of them that is left no deeper."""
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


LOSSES = (None, 0.0, 1.0, 1.0, 2.0, 3.0, math.nan, math.inf)
CHANGES = (*["save"] * 8, *["attach"] * 2, "pin", "rescue", "move", "lose", "late", "other", "fork")
some_rules: st.SearchStrategy[Any] = st.one_of(
    st.builds(
        KeepBest,
        st.integers(1, 3),
        st.just("loss"),
        mode=st.sampled_from(["min", "max"]),
        ties=st.sampled_from(["older", "newest", "incumbent"]),
        after_step=st.sampled_from([0, 0, 9]),
    ),
    st.builds(KeepLast, st.integers(1, 6)),
    st.builds(KeepEvery, steps=st.integers(2, 9)),
    st.builds(KeepEvery, epochs=st.integers(1, 4)),
    st.builds(KeepEvery, seconds=st.integers(2, 9)),
)
some_limits: st.SearchStrategy[Any] = st.lists(st.builds(Budget, bytes=st.integers(20, 90)), max_size=1)


@settings(max_examples=300)
@given(
    st.lists(some_rules, min_size=1, max_size=3),
    some_limits,
    st.sampled_from([None, "copy"]),
    st.sampled_from([0.1, 0.5, 1.0]),
    st.integers(0, 2**32),
)
def test_what_is_handed_on_is_what_would_be_found_anew(
    rules: list[Any], limits: list[Any], last: Any, asked: float, seed: int
) -> None:
    """Checkpoints come, go, get metrics, pins, names, are abandoned: what is decided follows from what is there."""
    policy = Policy(EverySteps(1), [*rules, *limits], last=last)
    # Sixty changes from one number: long stories are what finds something here, and Hypothesis draws short ones.
    chance = random.Random(seed)
    seen = manifest(seen=frozenset({"loss"}))
    for number in range(1, 61):
        seen = change(seen, chance.choice(CHANGES), chance.randrange(10**6), chance.choice(LOSSES), number)
        if chance.random() > asked:
            continue
        anew = attrs.evolve(seen, records=tuple(seen.records))
        assert anew.records == seen.records
        assert sum(r.size for r in seen.records) == seen.records.bytes
        loss = chance.choice(LOSSES)
        now = observation(number + 1, epoch=number // 3, metrics={} if loss is None else {"loss": loss})
        assert repr(decide(policy, now, anew)) == repr(decide(policy, now, seen))
        assert explain(policy, anew) == explain(policy, seen)
        gone = surplus(policy, seen)
        assert gone == surplus(policy, anew)
        assert repr(policy.scores(anew.history)) == repr(policy.scores(seen.history))
        seen = seen.without(*(name for name in gone if chance.random() < 0.9))


def change(seen: Manifest, what: str, which: int, loss: float | None, number: int) -> Manifest:
    """Return the manifest after something happened to it."""
    metrics = {} if loss is None else {"loss": loss}
    new = record(f"n{number}", step=number, epoch=number // 3, metrics=metrics, line=seen.line, serial=seen.next_serial)
    if what in ("save", "rescue"):
        return seen.with_record(attrs.evolve(new, kind="rescue" if what == "rescue" else "regular"))
    if what == "late":
        return seen.with_record(attrs.evolve(new, serial=which % 9 + 1, time=float(which % 50)))
    if what == "other":
        return seen.with_record(attrs.evolve(new, run="run-b"))
    if not len(seen.own):
        return seen
    one = seen.own[which % len(seen.own)]
    if what == "attach":
        return seen.with_record(attrs.evolve(one, metrics={**one.metrics, **metrics}))
    if what == "pin":
        return seen.with_record(attrs.evolve(one, pinned=not one.pinned))
    if what == "move":
        return seen.without(one.name).with_record(attrs.evolve(one, name=f"m{number}"))
    return seen.without(one.name) if what == "lose" else seen.resumed_at(one)


class KeepOdd:
    """A rule of one's own, which knows nothing of ledgers."""

    def keep(self, history: Any) -> dict[str, str]:
        return {record.name: "odd" for record in history if record.step % 2}


MANY: dict[str, list[Rule]] = {
    "all": [KeepAll()],
    "ranked": [KeepBest(10**6, "loss", mode="min"), KeepLast(2)],
    "each a half": [KeepEvery(steps=2), KeepLast(10**6)],
    "by time": [KeepEvery(seconds=1), KeepBest(2, "loss", mode="min")],
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


def calls_of_a_save(keep: list[Any], count: int) -> int:
    """Return how many functions a save calls in all, that many checkpoints being on record."""
    manager = CheckpointManager(
        MemoryStorage(), Policy(EverySteps(1), keep, last="copy"), state=lambda: {"w": 1}, run="run-a"
    )
    records = [
        record(f"epoch=0-step={n}.ckpt", step=n, epoch=0, metrics={"loss": n % 7}, size=1000, time=float(n))
        for n in range(1, count + 1)
    ]
    manager._directory.manifest = attrs.evolve(manager.manifest, records=records)
    for n in range(1, 4):
        manager.observe({"loss": 9.0}, step=count + n, epoch=0, epoch_end=False)
    assert len(manager.records) >= count * 0.9
    calls = counted(lambda: manager.observe({"loss": 9.0}, step=count + 4, epoch=0, epoch_end=False))
    manager.close()
    return calls


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
