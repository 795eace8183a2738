"""The manifest: which records count for a run, and which lie beyond a step it went back to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from support.factories import RUN, manifest, record

from checkpointer.records.manifest import Manifest
from checkpointer.records.record import Record


def names(records: Iterable[Record]) -> list[str]:
    """Return the records' names, in their order."""
    return [r.name for r in records]


def run_of(*steps: int, start: int = 1, prefix: str = "s", line: tuple[tuple[int, int], ...] = ()) -> list[Record]:
    """Return records at these steps, committed one after the other from serial ``start``."""
    return [
        record(name=f"{prefix}{step}", step=step, serial=serial, line=line)
        for serial, step in enumerate(steps, start=start)
    ]


def test_records_stand_in_commit_order() -> None:
    """The order on disk, or of a listing, means nothing."""
    assert ["s1", "s2", "s3"] == names(manifest([record(step=step) for step in (3, 1, 2)]).records)


def test_a_run_sees_its_own_records() -> None:
    """Another run's and another label's records are listed, but are not ours; their names are taken."""
    seen = manifest(
        [record(step=1), record(step=2, run="run-b"), record(step=3, label="x")], foreign=frozenset({"other.txt"})
    )
    assert ["s1", "s2", "s3"] == names(seen.records)
    assert ["s1"] == names(seen.own) == names(seen.history)
    assert {"s1", "s2", "s3", "other.txt"} == seen.taken
    assert 4 == seen.next_serial


def test_an_empty_directory() -> None:
    """Nothing is there, and nothing is made up."""
    empty = manifest()
    assert (None, None, 1, frozenset()) == (empty.newest, empty.at_step(1), empty.next_serial, empty.taken)


def test_a_rescue_is_newest_but_not_history() -> None:
    """A rescue counts for restoring, and no rule ever sees it."""
    seen = manifest([record(step=1), record(step=2, kind="rescue")])
    assert ["s1"] == names(seen.history)
    assert ["s1", "s2"] == names(seen.live)
    assert "s2" == (seen.newest and seen.newest.name)
    assert seen.at_step(2) is None


def test_going_on_from_the_newest_does_not_fork() -> None:
    """The usual restart leaves nothing abandoned."""
    records = run_of(1, 2, 3)
    resumed = manifest(records).resumed_at(records[-1])
    assert () == resumed.line
    assert () == resumed.abandoned


def test_going_back_abandons_what_lies_beyond() -> None:
    """Later records are listed as abandoned, and their names stay taken."""
    records = run_of(1, 2, 3)
    resumed = manifest(records).resumed_at(records[0])
    assert ["s1"] == names(resumed.history)
    assert ["s2", "s3"] == names(resumed.abandoned)
    assert {"s1", "s2", "s3"} == resumed.taken
    assert resumed.at_step(2) is None
    assert 4 == resumed.next_serial


def test_what_is_written_after_a_fork_counts() -> None:
    """The run goes on beside the abandoned records, beyond their steps too."""
    old = run_of(1, 2, 3)
    resumed = manifest(old).resumed_at(old[0])
    again = resumed.with_record(record(name="b4", step=4, serial=4, line=resumed.line))
    assert ["s1", "b4"] == names(again.history)
    assert ["s2", "s3"] == names(again.abandoned)
    newest = again.newest
    assert newest is not None
    assert resumed.line == manifest(again.records).resumed_at(newest).line


def test_going_back_to_an_abandoned_record_brings_its_line_back() -> None:
    """A process that restores the old branch sees it whole, and the other is abandoned instead."""
    old = run_of(1, 2, 3)
    fork = manifest(old).resumed_at(old[0]).line
    new = run_of(2, 3, start=4, prefix="b", line=fork)
    back = manifest([*old, *new]).resumed_at(old[2])
    assert ["s1", "s2", "s3"] == names(back.history)
    assert ["b2", "b3"] == names(back.abandoned)
    assert back.line != fork


def test_two_forks_at_one_step_do_not_see_each_other() -> None:
    """Forks differ by number, not by step."""
    old = run_of(1, 2)
    first = manifest(old).resumed_at(old[0])
    one = first.with_record(record(name="b2", step=2, serial=3, line=first.line))
    second = manifest(one.records).resumed_at(old[0])
    assert first.line != second.line
    assert ["s1"] == names(second.history)
    assert ["s2", "b2"] == names(second.abandoned)


def test_a_fork_of_a_fork() -> None:
    """Each fork cuts off what lies beyond it on every line it descends from."""
    old = run_of(1, 2, 3, 4)
    first = manifest(old).resumed_at(old[2]).line
    mid = run_of(4, 5, start=5, prefix="b", line=first)
    seen = manifest([*old, *mid]).resumed_at(mid[0])
    assert ["s1", "s2", "s3", "b4"] == names(seen.history)
    assert ["s4", "b5"] == names(seen.abandoned)
    deeper = manifest([*old, *mid]).resumed_at(old[1])
    assert ["s1", "s2"] == names(deeper.history)


def test_what_is_abandoned_does_not_depend_on_what_was_retired() -> None:
    """A crash between two retirements leaves the same view of the rest."""
    old = run_of(1, 2, 3)
    resumed = manifest(old).resumed_at(old[1]).with_record(record(name="b3", step=3, serial=4, line=((1, 2),)))
    assert ["s3"] == names(resumed.abandoned) == names(resumed.without("s2").abandoned)


def test_resuming_adopts_the_run_of_the_record() -> None:
    """Restoring another run's checkpoint claims that run."""
    other = record(step=1, run="run-b")
    resumed = manifest([other, record(step=2)]).resumed_at(other)
    assert "run-b" == resumed.run
    assert ["s1"] == names(resumed.history)
    assert RUN == manifest().run


def test_with_record_replaces_the_one_of_its_name() -> None:
    """A name stands for one record, and is not foreign any more."""
    seen = manifest([record(name="a", step=1)], foreign=frozenset({"b"}))
    seen = seen.with_record(record(name="a", step=2)).with_record(record(name="b", step=3))
    assert [("a", 2), ("b", 3)] == [(r.name, r.step) for r in seen.records]
    assert frozenset() == seen.foreign
    assert ["b"] == names(seen.without("a", "never-there").records)


records = st.builds(
    record,
    name=st.sampled_from("abcd"),
    step=st.integers(1, 6),
    serial=st.integers(1, 9),
    run=st.sampled_from([RUN, "run-b"]),
    label=st.sampled_from(["", "x"]),
    line=st.sampled_from([(), ((1, 3),), ((1, 3), (2, 4))]),
    kind=st.sampled_from(["regular", "rescue"]),
    term=st.integers(0, 2),
    reason=st.sampled_from(["", "adopted: torch.save"]),
)


@given(
    st.lists(records, max_size=6),
    records,
    st.sampled_from([(), ((1, 3),)]),
    st.sampled_from([{}, {(RUN, ""): ((2, 4),)}]),
)
def test_a_manifest_that_got_a_record_is_as_one_made_of_all(
    before: list[Record], new: Record, line: tuple[tuple[int, int], ...], limits: dict[tuple[str, str], Any]
) -> None:
    """What was known of the others is not computed again, and the result is the same."""
    there = {one.name: one for one in before}
    got = manifest([*there.values()], line=line, limits=limits).with_record(new)
    made = manifest([*(there | {new.name: new}).values()], line=line, limits=limits)
    for known in ("records", "own", "live", "history", "by_name", "abandoned", "next_serial"):
        assert getattr(made, known) == getattr(got, known), known


def test_at_step_takes_the_newest_of_a_step() -> None:
    """If a step was written twice, the later one stands."""
    seen = manifest([record(name="a", step=1, serial=1), record(name="b", step=1, serial=2)])
    found = seen.at_step(1)
    assert "b" == (found and found.name)


def test_manifests_are_values() -> None:
    """Changing one makes another and leaves the first."""
    first = Manifest(run=RUN)
    first.with_record(record())
    assert () == first.records
