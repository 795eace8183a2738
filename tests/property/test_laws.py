"""Laws that hold for every policy, history and file, looked for by Hypothesis."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import attrs
from hypothesis import assume, given
from hypothesis import strategies as st
from support.factories import RUN, manifest, observation, record

from checkpointer.errors import RecordError
from checkpointer.policy.decide import Attach, Save, decide, explain, surplus
from checkpointer.policy.naming import Naming
from checkpointer.policy.policy import Policy
from checkpointer.policy.ranking import Metric, place
from checkpointer.policy.retention import Budget, KeepAll, KeepBest, KeepEvery, KeepLast
from checkpointer.policy.triggers import AnyOf, AtSteps, EveryEpochs, EverySeconds, EverySteps
from checkpointer.records.names import name_problem
from checkpointer.records.record import Entry, Progress, Record

counts = st.integers(1, 20)
texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8)
values = st.one_of(st.floats(), st.sampled_from([0.0, -0.0, 1.0, math.nan, math.inf, -math.inf]))
losses = st.one_of(st.none(), values)
seconds = st.floats(0, 1e6) | st.floats(0, 1)

step_triggers = st.builds(EverySteps, counts, after=st.integers(0, 30)) | st.builds(
    lambda steps: AtSteps(*steps), st.lists(st.integers(0, 100), max_size=4)
)
leaves = step_triggers | st.builds(EveryEpochs, counts, after=st.integers(0, 5)) | st.builds(EverySeconds, seconds)
triggers: st.SearchStrategy[Any] = st.recursive(
    leaves, lambda inner: st.builds(lambda some: AnyOf(*some), st.lists(inner, max_size=3)), max_leaves=5
)
keep_best = st.builds(
    KeepBest,
    st.integers(1, 4),
    st.just("loss"),
    mode=st.sampled_from(["min", "max"]),
    ties=st.sampled_from(["older", "newest", "incumbent"]),
    after_step=st.integers(0, 5),
)
rules: st.SearchStrategy[Any] = st.one_of(
    keep_best,
    st.builds(KeepLast, st.integers(1, 4)),
    st.builds(KeepAll),
    st.builds(KeepEvery, steps=counts),
    st.builds(KeepEvery, epochs=counts),
    st.builds(KeepEvery, seconds=st.floats(0.1, 100)),
    st.builds(Budget, bytes=st.integers(1, 60)),
)
templates = st.sampled_from([None, "x", "{epoch}", "{epoch}-{loss:.1f}", "{loss}/{step}", "last", "best"])
namings = st.builds(
    Naming,
    templates,
    version_counter=st.booleans(),
    auto_insert=st.booleans(),
    join=st.sampled_from(["-", "_", ""]),
    slashes=st.sampled_from(["replace", "keep"]),
)
aliases: st.SearchStrategy[Any] = st.sampled_from([None, "link", "copy"])


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """Any policy that is valid."""
    keep = draw(st.lists(rules, max_size=3))
    ranks = any(isinstance(rule, KeepBest) for rule in keep)
    return Policy(
        draw(triggers),
        keep,
        name=draw(namings),
        last=draw(aliases),
        best=draw(aliases) if ranks else None,
        contents=draw(st.sampled_from(["full", "weights"])),
        rescue=draw(st.booleans()),
    )


@st.composite
def histories(draw: st.DrawFn) -> list[Record]:
    """Records in commit order, some pinned, some rescues."""
    return [
        record(
            step=step,
            epoch=step // 3,
            metrics={} if loss is None else {"loss": loss},
            pinned=draw(st.integers(0, 5)) == 0,
            kind=draw(st.sampled_from(["regular", "regular", "regular", "rescue"])),
        )
        for step, loss in enumerate(draw(st.lists(losses, max_size=8)), start=1)
    ]


@given(
    st.lists(values, max_size=8), st.sampled_from(["min", "max"]), st.sampled_from(["older", "newest"]), st.randoms()
)
def test_the_order_is_total(numbers: list[float], mode: Any, ties: Any, random: Any) -> None:
    """Whatever the values and the order they come in, there is one ranking, and NaN is at its end."""
    records = [record(step=step, metrics={"loss": value}) for step, value in enumerate(numbers, start=1)]
    metric = Metric("loss", mode=mode, ties=ties)
    ranked = metric.ranked(records)
    shuffled = list(records)
    random.shuffle(shuffled)
    assert ranked == metric.ranked(shuffled)
    age = -1 if ties == "newest" else 1
    keys = [(*place(score), age * one.serial) for score, one in metric.scored(ranked)]
    assert all(one < other for one, other in pairwise(keys))
    nans = [math.isnan(r.metrics["loss"]) for r in ranked]
    assert sorted(nans) == nans
    proper = [r.metrics["loss"] for r in ranked if math.isfinite(r.metrics["loss"])]
    assert sorted(proper, reverse=mode == "max") == proper


@given(policies(), histories())
def test_kept_is_a_subset_of_history(policy: Policy, records: list[Record]) -> None:
    """What stays and what goes are parts of the history, and together all of it but the slot."""
    seen = manifest(records)
    kept, gone = set(explain(policy, seen)), set(surplus(policy, seen))
    names = {r.name for r in seen.live}
    assert kept <= names
    assert gone == names - kept
    assert not any(r.pinned for r in records if r.name in gone)


@given(policies(), histories())
def test_retiring_the_surplus_leaves_no_surplus(policy: Policy, records: list[Record]) -> None:
    """Rules look at what is left and keep it: nothing unravels save by save."""
    seen = manifest(records)
    assert () == surplus(policy, seen.without(*surplus(policy, seen)))


@given(policies(), histories(), losses)
def test_the_newest_survives_when_last_is_set(policy: Policy, records: list[Record], loss: float | None) -> None:
    """The alias never names what is to be retired, before or after a save."""
    assume(policy.last is not None)
    seen = manifest(records)
    if seen.history:
        assert seen.history[-1].name not in surplus(policy, seen)
    for decision, after in run_on(policy, records, [loss]):
        assert not isinstance(decision, Save) or decision.name not in decision.retire
        assert not after.history or after.history[-1].name not in surplus(policy, after)


@given(policies(), st.lists(losses, max_size=8))
def test_names_never_repeat(policy: Policy, reported: list[float | None]) -> None:
    """No save takes a name that is in use, unless it says that it replaces it; another run's only without versions."""
    taken_by_others = {"x.ckpt", "epoch=0.ckpt", "loss=1.0.ckpt"}
    others = [record(name=name, step=1, serial=1, run="run-b", token=name) for name in sorted(taken_by_others)]
    living = set(taken_by_others)
    for decision, after in run_on(policy, others, reported):
        if isinstance(decision, Save):
            if not policy.name.version_counter:
                taken_by_others.discard(decision.name)
            assert decision.name not in taken_by_others
            assert decision.replaces == (decision.name in living)
            assert decision.name not in decision.retire
        living = set(after.by_name)
        assert taken_by_others <= living


def run_on(policy: Policy, records: list[Record], reported: list[float | None]) -> list[tuple[Any, Any]]:
    """Carry out what is decided on one observation per loss, and return each decision with what it leaves."""
    seen, since, done = manifest(records, seen=frozenset({"loss"})), Progress(), []
    first = max((r.step for r in records), default=0) + 1
    for step, loss in enumerate(reported, start=first):
        metrics = {} if loss is None else {"loss": loss}
        now = observation(step, epoch=step // 3, metrics=metrics)
        decision = decide(policy, now, seen, since=since)
        if isinstance(decision, Save):
            new = record(name=decision.name, step=step, epoch=step // 3, metrics=metrics, serial=seen.next_serial)
            seen = seen.with_record(new)
        if isinstance(decision, (Save, Attach)):
            seen = seen.without(*decision.retire)
        if isinstance(decision, Save) or getattr(decision, "due", False):
            since = now.progress
        done.append((decision, seen))
    return done


@given(policies(), st.lists(losses, max_size=8))
def test_a_loop_holds_what_the_rules_keep(policy: Policy, reported: list[float | None]) -> None:
    """After every save nothing is left that no rule keeps, versions counted or not."""
    for decision, after in run_on(policy, [], reported):
        if isinstance(decision, Save):
            assert () == surplus(policy, after)


any_record = st.builds(
    record,
    name=texts.filter(lambda name: "/" not in name and not name_problem(name)),
    step=st.integers(0, 10**9),
    epoch=st.integers(0, 10**6),
    epoch_end=st.booleans(),
    metrics=st.dictionaries(texts, values, max_size=4),
    time=st.floats(-(2.0**34), 2.0**34),
    size=st.integers(0, 10**15),
    contents=st.sampled_from(["full", "weights"]),
    kind=st.sampled_from(["regular", "rescue"]),
    reason=texts,
    label=texts,
    line=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 99)), max_size=3).map(tuple),
    pinned=st.booleans(),
)
entries = st.builds(
    Entry,
    record=any_record,
    status=st.sampled_from(["pending", "committed", "retired"]),
    previous=st.none() | any_record,
    owner=st.just("") | texts,
).map(
    lambda entry: attrs.evolve(entry, previous=entry.previous and attrs.evolve(entry.previous, name=entry.record.name))
)


@given(entries)
def test_entries_round_trip(entry: Entry) -> None:
    """A record file says what was written, NaN and infinities included."""
    again = Entry.from_json(entry.to_json(), "f")
    assert entry == again
    assert entry.to_json() == again.to_json()


@given(policies())
def test_policies_round_trip_as_yaml(policy: Policy) -> None:
    """Every policy survives the file, and its text is stable."""
    text = policy.to_yaml()
    assert policy == Policy.from_yaml(text)
    assert text == Policy.from_yaml(text).to_yaml()


@given(texts, texts, texts)
def test_any_text_survives_the_yaml(metric: str, join: str, part: str) -> None:
    """Metric names and separators that look like YAML are still text."""
    policy = Policy(EverySteps(1), [KeepBest(1, metric, mode="min")])
    assert policy == Policy.from_yaml(policy.to_yaml())
    assume(not set("{}/\\:") & set(join + part) and (join + part).strip("."))
    named = Policy(EverySteps(1), [KeepAll()], name=Naming(f"a{part}", join=join))
    assert named == Policy.from_yaml(named.to_yaml())


progress = st.builds(
    Progress, step=st.integers(0, 100), epochs=st.integers(0, 20), time=st.floats(0, 2e9) | st.floats(0, 10)
)


@given(triggers, progress, progress)
def test_the_horizon_never_skips_a_due_observation(trigger: Any, now: Progress, since: Progress) -> None:
    """Below all three bounds nothing is due, for a clock that has not been set back."""
    horizon = trigger.horizon(since)
    if now.time >= since.time and now.step < horizon.step and now.epochs < horizon.epochs and now.time < horizon.time:
        assert trigger.due(now, since) is None


@given(counts, st.integers(0, 40))
def test_a_loop_that_reports_every_step_gets_exactly_the_multiples(n: int, after: int) -> None:
    """Also after a warm-up, and from any start."""
    assert [step for step in range(1, 100) if step % n == 0 and step > after] == due(n, after, range(1, 100))


@given(counts.filter(lambda n: n >= 7), st.integers(0, 6))
def test_a_loop_that_reports_every_7_steps_misses_no_multiple(n: int, start: int) -> None:
    """Each multiple is followed by a due report within 7 steps, and there is no other."""
    reported = range(start, 300, 7)
    expected = [next(step for step in reported if step >= multiple) for multiple in range(n, reported[-1] + 1, n)]
    assert expected == due(n, 0, reported)


def due(n: int, after: int, reported: range) -> list[int]:
    """Return the steps at which the trigger was due."""
    trigger, since, steps = EverySteps(n, after=after), Progress(), []
    for step in reported:
        if trigger.due(Progress(step=step), since):
            since = Progress(step=step)
            steps.append(step)
    return steps


any_text = st.text(st.characters(), max_size=5) | st.just("\ud800")
plain: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=5,
)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_record_error(data: bytes) -> None:
    """Nothing else escapes, whatever stands in the file."""
    assert is_refused(data)


@given(plain)
def test_arbitrary_json_is_a_record_error(data: object) -> None:
    """A file of something else is not taken for a record."""
    assert is_refused(json.dumps(data).encode())


@given(entries, st.data())
def test_a_record_with_one_value_changed_is_read_or_refused(entry: Entry, data: st.DataObject) -> None:
    """Each field alone may hold anything: the reader says so, or takes it and can write it again."""
    whole: dict[str, Any] = json.loads(entry.to_json())
    where: dict[str, Any] = whole if data.draw(st.booleans()) else whole["record"]
    where[data.draw(st.sampled_from(sorted(where)))] = data.draw(plain)
    assert is_refused(json.dumps(whole).encode()) or Entry.from_json(json.dumps(whole).encode(), "f").to_json()


def is_refused(data: bytes) -> bool:
    """Return whether reading raises a RecordError; any other error escapes."""
    try:
        Entry.from_json(data, "f")
    except RecordError:
        return True
    return False


@given(st.dictionaries(texts, values, max_size=3), policies())
def test_deciding_is_pure(metrics: Mapping[str, float], policy: Policy) -> None:
    """The same arguments give the same answer."""
    seen = manifest([record(step=1, metrics={"loss": 1.0})], seen=frozenset({"loss"}))
    now = observation(5, metrics=dict(metrics))
    assert RUN == seen.run
    assert repr(decide(policy, now, seen)) == repr(decide(policy, now, seen))
