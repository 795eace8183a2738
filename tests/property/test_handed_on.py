"""What a ledger hands on is what working it out anew would find."""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
from hypothesis import given, settings
from hypothesis import strategies as st
from support.factories import manifest, observation, record

from checkpointer import EverySteps, KeepBest, KeepEvery, KeepLast, Policy
from checkpointer.policy.decide import decide, explain, surplus
from checkpointer.policy.ledger import Ledger, ledger_of
from checkpointer.policy.ordered import Ordered
from checkpointer.policy.retention import Budget, Kept
from checkpointer.records.manifest import Manifest
from checkpointer.records.record import Record


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


def is_odd(one: Record) -> bool:
    """Return whether the step is odd."""
    return bool(one.step % 2)


@attrs.frozen
class OfOddSteps:
    """Keeps of a part of the history what its rule keeps, and can be asked about one record, as hosts' rules can."""

    rule: Any

    def keep(self, history: Sequence[Record]) -> Mapping[str, str]:
        return Kept(self, ledger_of(history))

    def why(self, one: Record, history: Ledger) -> str | None:
        why: str | None = self.rule.why(one, history.where(is_odd)) if is_odd(one) else None
        return why

    def kept(self, history: Ledger) -> Any:
        return self.rule.kept(history.where(is_odd))

    def may_lose(self, before: Ledger, history: Ledger) -> Any:
        then, odd = before.where(is_odd), history.where(is_odd)
        return self.rule.may_lose(then, odd) if odd.follows(then) else odd

    def instead_of(self, one: Record, history: Ledger) -> Any:
        return self.rule.instead_of(one, history.where(is_odd))


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
some_rules |= st.builds(OfOddSteps, some_rules)
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
        if chance.random() < 0.2:
            seen = attrs.evolve(seen, records=tuple(seen.records))  # Of which nothing was ever asked.
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
