"""What a policy decides: save, skip, attach or rescue, under which name, and what is retired for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from support.factories import history, manifest, observation, record

from checkpointer.errors import NamingError, PolicyError
from checkpointer.policy.decide import Attach, Decision, Save, Skip, decide, decide_rescue, explain, surplus
from checkpointer.policy.naming import Naming
from checkpointer.policy.policy import Policy
from checkpointer.policy.retention import Budget, KeepAll, KeepBest, KeepEvery, KeepLast
from checkpointer.policy.triggers import AnyOf, EverySteps
from checkpointer.records.record import Progress, Record

BEST = KeepBest(1, "loss", mode="min")
EACH = EverySteps(1)


def saved(decision: Decision) -> Save:
    """Return the decision, which must be to save."""
    assert isinstance(decision, Save), decision
    return decision


def skipped(decision: Decision) -> Skip:
    """Return the decision, which must be not to save."""
    assert isinstance(decision, Skip), decision
    return decision


def attached(decision: Decision) -> Attach:
    """Return the decision, which must be to attach."""
    assert isinstance(decision, Attach), decision
    return decision


# ---------------------------------------------------------------- save or skip


def test_a_due_observation_that_a_rule_keeps_is_saved_with_the_reason() -> None:
    """The decision names file, victims and why."""
    decision = saved(decide(Policy(EverySteps(10), [KeepLast(1)]), observation(10), manifest(history(1.0))))
    assert "epoch=0-step=10.ckpt" == decision.name
    assert ("s1",) == decision.retire
    assert "step 10 reached a multiple of 10; kept: the newest" == decision.reason
    assert (True, False, "regular") == (bool(decision), decision.replaces, decision.kind)


def test_what_is_not_due_is_skipped() -> None:
    """Without a crossing nothing is even ranked."""
    decision = skipped(decide(Policy(EverySteps(10), [KeepLast(1)]), observation(9), manifest()))
    assert ("not due: every 10 steps", False, "") == (decision.reason, decision.due, decision.waiting)
    assert not decision


def test_a_worse_one_is_declined_and_counts_as_due() -> None:
    """A declined observation says by what it lost, and moves the triggers on."""
    decision = skipped(decide(Policy(EACH, [BEST]), observation(loss=2.0), manifest(history(1.0))))
    assert decision.due
    assert not decision.waiting
    assert "loss=2 is not in the best by loss (min)" in decision.reason


def test_a_better_one_takes_the_place_of_the_worst() -> None:
    """The k best hold k at most, and the worst of them goes."""
    policy = Policy(EACH, [KeepBest(2, "loss", mode="min")])
    decision = saved(decide(policy, observation(loss=2.0), manifest(history(1.0, 3.0))))
    assert ("s2",) == decision.retire


def test_a_tie_goes_to_the_older_unless_said_otherwise() -> None:
    """An equal value does not replace the best, or does if asked to."""
    assert not decide(Policy(EACH, [BEST]), observation(loss=1.0), manifest(history(1.0)))
    newest = KeepBest(1, "loss", mode="min", ties="newest")
    assert ("s1",) == saved(decide(Policy(EACH, [newest]), observation(loss=1.0), manifest(history(1.0)))).retire


def test_nan_fills_an_empty_slot_only() -> None:
    """A NaN is kept while there is room, and goes first."""
    policy = Policy(EACH, [KeepBest(2, "loss", mode="min")])
    assert decide(policy, observation(loss=float("nan")), manifest(history(1.0)))
    assert not decide(policy, observation(loss=float("nan")), manifest(history(1.0, 2.0)))
    assert ("s2",) == saved(decide(policy, observation(loss=9.0), manifest(history(1.0, float("nan"))))).retire


def test_the_newest_record_is_where_triggers_count_from() -> None:
    """Without a since the newest record is the last due observation, a rescue included."""
    seen = manifest([record(step=5), record(step=9, kind="rescue")])
    assert not decide(Policy(EverySteps(3), [KeepLast(1)]), observation(11), seen)
    assert decide(Policy(EverySteps(3), [KeepLast(1)]), observation(12), seen)
    assert decide(Policy(EverySteps(3), [KeepLast(1)]), observation(11), seen, since=Progress(step=5))


def test_an_interrupted_retire_heals_at_the_next_save() -> None:
    """Every rule sees the whole history, so what was left over goes too."""
    decision = saved(decide(Policy(EACH, [KeepLast(2)]), observation(10), manifest(history(1, 2, 3, 4))))
    assert ("s1", "s2", "s3") == decision.retire


def test_records_of_other_runs_are_never_retired() -> None:
    """Other runs, other labels and abandoned records are left alone."""
    records = [
        record(step=1, run="run-b"),
        record(step=2, label="x"),
        record(step=3),
        record(step=9),
    ]
    seen = manifest(records).resumed_at(records[2])
    decision = saved(decide(Policy(EACH, [KeepLast(1)]), observation(4), seen))
    assert ("s3",) == decision.retire


def test_no_rules_keep_nothing() -> None:
    """An empty policy is legal and says what is wrong with it."""
    assert "no rule keeps it: none given" in decide(Policy(EACH, []), observation(), manifest()).reason


# ---------------------------------------------------------------- waiting for a metric


def test_a_ranked_save_waits_for_its_metric() -> None:
    """If only ranked rules would keep it, the save waits, and says what it has."""
    decision = skipped(decide(Policy(EACH, [BEST]), observation(acc=0.5), manifest()))
    assert (True, "step 10 reached a multiple of 1") == (decision.due, decision.waiting)
    assert "waiting for loss (reported: acc)" in decision.reason


def test_the_next_observation_with_the_metric_takes_the_open_point() -> None:
    """An owed save is of the later step, due there or not."""
    policy = Policy(EverySteps(100), [BEST], name="{step}-{loss:.1f}")
    now = observation(101, loss=0.5)
    assert not decide(policy, now, manifest(), since=Progress(step=100))
    decision = saved(decide(policy, now, manifest(), since=Progress(step=100), owed="step 100 was due"))
    assert "step=101-loss=0.5.ckpt" == decision.name
    assert decision.reason.startswith("step 100 was due; kept:")


@pytest.mark.parametrize("rule", [KeepLast(1), KeepAll(), KeepEvery(steps=5)])
def test_rules_that_need_no_metric_save_now(rule: Any) -> None:
    """The part of the name whose metric is not there yet is left out."""
    policy = Policy(EACH, [BEST, rule], name="{step}-{loss:.1f}")
    assert "step=10.ckpt" == saved(decide(policy, observation(10), manifest())).name


def test_last_saves_now_under_a_name_of_its_own() -> None:
    """The metric may still come, and a slot could not be ranked then."""
    for last in ("link", "copy"):
        policy = Policy(EACH, [BEST], last=last)
        assert "epoch=0-step=10.ckpt" == saved(decide(policy, observation(10), manifest())).name


def test_warm_up_is_declined_without_waiting() -> None:
    """Before after_step no metric can help, so nothing is owed."""
    policy = Policy(EACH, [KeepBest(1, "loss", mode="min", after_step=10)])
    decision = skipped(decide(policy, observation(10), manifest()))
    assert (True, "") == (decision.due, decision.waiting)
    assert decide(policy, observation(11, loss=5.0), manifest([record(step=1, metrics={"loss": 0.0})]))


# ---------------------------------------------------------------- names


def test_a_misspelt_metric_in_the_template_is_an_error() -> None:
    """Neither reported, nor seen before, nor named by a rule."""
    policy = Policy(EACH, [KeepLast(1)], name="{los}")
    with pytest.raises(NamingError, match="asks for 'los'"):
        decide(policy, observation(loss=1.0), manifest())
    assert decide(policy, observation(loss=1.0), manifest(seen=frozenset({"los"})))


def test_names_in_use_get_a_version() -> None:
    """Foreign files, other runs and abandoned records keep their names."""
    policy = Policy(EACH, [KeepAll()], name="x")
    records = [record(name="x.ckpt", step=1, run="run-b"), record(name="x-v2.ckpt", step=2)]
    seen = manifest(records, foreign=frozenset({"x-v1.ckpt"}))
    assert "x-v3.ckpt" == saved(decide(policy, observation(), seen)).name


def test_a_name_that_is_retired_for_it_is_written_again() -> None:
    """As in Lightning: the victim's own name does not force a version."""
    decision = saved(decide(Policy(EACH, [KeepLast(1)], name="x"), observation(), manifest([record(name="x.ckpt")])))
    assert ("x.ckpt", True, ()) == (decision.name, decision.replaces, decision.retire)


def test_without_version_counter_a_checkpoint_of_that_name_is_replaced() -> None:
    """Of this run or of another; not one that is pinned, resumed from or of another manager, and no foreign file."""
    policy = Policy(EACH, [KeepAll()], name=Naming("x", version_counter=False))
    for replaced in (record(name="x.ckpt"), record(name="x.ckpt", run="run-b"), record(name="x.ckpt", kind="rescue")):
        assert saved(decide(policy, observation(), manifest([replaced]))).replaces
    for seen in (
        manifest([record(name="x.ckpt", pinned=True)]),
        manifest([record(name="x.ckpt", run="run-b", pinned=True)]),
        manifest([record(name="x.ckpt", label="b")]),
        manifest([record(name="x.ckpt", step=9)], line=((1, 5),)),
        manifest([record(name="x.ckpt")], resumed="x.ckpt"),
        manifest(foreign=frozenset({"x.ckpt"})),
    ):
        decision = saved(decide(policy, observation(), seen))
        assert ("x-v1.ckpt", False) == (decision.name, decision.replaces)


def test_what_is_replaced_takes_no_place_among_the_kept() -> None:
    """The last 2 stay 2 when the newer of them is written over."""
    policy = Policy(EACH, [KeepLast(2)], name=Naming("{epoch}", version_counter=False))
    seen = manifest([record(name="epoch=0.ckpt", step=1, epoch=0), record(name="epoch=1.ckpt", step=2, epoch=1)])
    decision = saved(decide(policy, observation(3, epoch=1), seen))
    assert ("epoch=1.ckpt", True, ()) == (decision.name, decision.replaces, decision.retire)


def test_a_template_cannot_take_an_alias_name() -> None:
    """A checkpoint called as the alias is would be overwritten by it."""
    assert (
        "last-v1.ckpt"
        == saved(decide(Policy(EACH, [KeepAll()], name="last", last="link"), observation(), manifest())).name
    )
    assert "last.ckpt" == saved(decide(Policy(EACH, [KeepAll()], name="last"), observation(), manifest())).name


# ---------------------------------------------------------------- last and best


def test_with_last_every_due_observation_is_saved() -> None:
    """What ranks below the best is saved all the same, and is kept until the next."""
    policy = Policy(EACH, [BEST], last="link")
    decision = saved(decide(policy, observation(10, loss=5.0), manifest(history(1.0, 2.0))))
    assert "epoch=0-step=10.ckpt" == decision.name
    assert ("s2",) == decision.retire


def test_last_as_a_copy_is_written_straight_into_its_slot() -> None:
    """What no rule keeps has no name of its own, so that nothing is written twice."""
    policy = Policy(EACH, [BEST], last="copy")
    seen = manifest(history(1.0))
    first = saved(decide(policy, observation(10, loss=5.0), seen))
    assert ("last.ckpt", False, ()) == (first.name, first.replaces, first.retire)
    seen = seen.with_record(record(name="last.ckpt", step=10, serial=2, metrics={"loss": 5.0}))
    again = saved(decide(policy, observation(11, loss=4.0), seen))
    assert ("last.ckpt", True, ()) == (again.name, again.replaces, again.retire)
    better = saved(decide(policy, observation(12, loss=0.5), seen))
    assert ("epoch=0-step=12.ckpt", ("s1",)) == (better.name, better.retire)


def test_the_slot_is_no_rules_business() -> None:
    """The next save overwrites it, so a rule that counted it would lose one."""
    policy = Policy(EACH, [KeepLast(2)], last="copy")
    seen = manifest([*history(1, 2), record(name="last.ckpt", step=3)])
    assert {"s1", "s2", "last.ckpt"} == explain(policy, seen).keys()
    assert () == surplus(policy, seen)


def test_the_newest_is_kept_while_last_names_it() -> None:
    """A link to a retired file would be worse than none."""
    seen = manifest(history(1.0, 5.0))
    assert ("s2",) == surplus(Policy(EACH, [BEST]), seen)
    assert () == surplus(Policy(EACH, [BEST], last="link"), seen)
    assert "newest (last points here)" in explain(Policy(EACH, [BEST], last="link"), seen)["s2"]


def test_best_of_looks_where_the_rule_looks() -> None:
    """The warm-up is not ranked, and without a ranking there is no best."""
    policy = Policy(EACH, [KeepBest(1, "loss", mode="min", after_step=1)], best="link")
    best = policy.best_of(history(0.0, 2.0, 1.0))
    assert "s3" == (best and best.name)
    assert policy.best_of([]) is None
    assert Policy(EACH, [KeepAll()]).best_of(history(1.0)) is None


def test_aliases_are_what_was_asked_for() -> None:
    """By file name, with how each is made."""
    policy = Policy(EACH, [BEST], last="link", best="copy", name=Naming(best="top", extension=".pt"))
    assert {"last.pt": "link", "top.pt": "copy"} == policy.aliases
    assert {} == Policy(EACH, [BEST]).aliases


# ---------------------------------------------------------------- pins and budgets


def test_a_pinned_checkpoint_is_never_retired() -> None:
    """It is kept beside the k of any rule."""
    records = [record(step=1, pinned=True), record(step=2), record(step=3)]
    policy = Policy(EACH, [KeepLast(1)])
    assert ("s2",) == surplus(policy, manifest(records))
    assert ("pinned",) == explain(policy, manifest(records))["s1"]


def test_a_pinned_rescue_is_kept() -> None:
    """A regular save retires a rescue, but not one that the user pinned."""
    records = [record(step=1, kind="rescue", pinned=True), record(step=2, kind="rescue"), record(step=3)]
    assert ("s2",) == surplus(Policy(EACH, [KeepLast(1)]), manifest(records))


def test_a_budget_makes_room_before_the_save() -> None:
    """The save is taken to be as large as the one before."""
    policy = Policy(EACH, [KeepAll(), Budget(bytes=30)])
    assert () == saved(decide(policy, observation(10), manifest(history(1, 2)))).retire
    assert ("s1",) == saved(decide(policy, observation(10), manifest(history(1, 2, 3)))).retire


def test_a_budget_spares_best_and_newest() -> None:
    """However small the budget, the best and the newest stay."""
    policy = Policy(EACH, [BEST, KeepAll(), Budget(bytes=1)])
    assert ("s1", "s3") == surplus(policy, manifest(history(3, 1, 2, 9)))


def test_a_budget_spares_the_best_of_the_rule_with_its_warm_up() -> None:
    """The record that the best alias names is never dropped for one that is not ranked."""
    policy = Policy(EACH, [KeepBest(1, "loss", mode="min", after_step=1), KeepAll(), Budget(bytes=1)], best="link")
    seen = manifest(history(0, 1, 2, 3))
    best = policy.best_of(seen.history)
    assert best is not None
    assert best.name not in surplus(policy, seen)
    assert ("s1", "s3") == surplus(policy, seen)


def test_a_budget_counts_the_newest_that_last_names() -> None:
    """What only the alias keeps takes room too."""
    policy = Policy(EACH, [KeepBest(3, "loss", mode="min"), Budget(bytes=30)], last="link")
    assert ("s3",) == surplus(policy, manifest(history(1, 2, 3, 9)))


# ---------------------------------------------------------------- attach


def test_observing_a_saved_step_again_attaches_the_metrics() -> None:
    """Save before validation, rank after it; nothing is written again."""
    policy = Policy(EACH, [BEST, KeepLast(1)])
    seen = manifest([*history(1.0), record(step=2)])
    decision = attached(decide(policy, observation(2, loss=0.5), seen))
    assert ("s2", ("s1",)) == (decision.name, decision.retire)
    assert "step 2 is saved already as s2; attached loss" == decision.reason
    assert not decision


def test_observing_a_saved_step_with_nothing_new_is_a_skip() -> None:
    """The same metrics again change nothing, NaN included."""
    nan = float("nan")
    seen = manifest([record(step=2, metrics={"a": nan, "b": 1.0})])
    decision = skipped(decide(Policy(EACH, [BEST]), observation(2, a=float("nan"), b=1.0), seen))
    assert not decision.due
    assert "step 2 is saved already as s2" == decision.reason


def test_attaching_does_not_wait_for_a_due_point() -> None:
    """Metrics come when they come."""
    policy = Policy(EverySteps(1000), [KeepLast(1)])
    assert "attached loss" in attached(decide(policy, observation(2, loss=1.0), manifest([record(step=2)]))).reason


def test_an_abandoned_step_is_saved_anew() -> None:
    """What lies beyond the fork is not this line's checkpoint, and keeps its name."""
    records = [record(step=1), record(name="epoch=0-step=2.ckpt", step=2)]
    seen = manifest(records).resumed_at(records[0])
    assert "epoch=0-step=2-v1.ckpt" == saved(decide(Policy(EACH, [KeepAll()]), observation(2), seen)).name


# ---------------------------------------------------------------- rescue


def test_a_rescue_has_a_name_of_its_own_and_retires_nothing() -> None:
    """Never over anything, whatever the template and the rules say."""
    policy = Policy(EACH, [KeepLast(1)], name=Naming("x", version_counter=False))
    seen = manifest([record(step=1), record(name="rescue-step=7.ckpt", step=7, kind="rescue")])
    decision = decide_rescue(policy, observation(7), seen, "KeyboardInterrupt")
    assert ("rescue-step=7-v1.ckpt", (), "rescue", False) == (
        decision.name,
        decision.retire,
        decision.kind,
        decision.replaces,
    )
    assert "rescue: KeyboardInterrupt" == decision.reason


@pytest.mark.parametrize(
    ("records", "template", "expected"),
    [
        ([], "model", "model.ckpt"),
        ([], "{epoch}-{loss:.1f}", "epoch=0-loss=0.5.ckpt"),
        ([record(name="model.ckpt", step=1)], "model", "rescue-step=7.ckpt"),
        ([record(name="model.ckpt", step=1, run="another")], "model", "rescue-step=7.ckpt"),
        ([], "last", "rescue-step=7.ckpt"),
        ([], "{unknown}", "rescue-step=7.ckpt"),
    ],
)
def test_a_rescue_may_take_the_name_of_the_template_where_it_is_free(
    records: list[Record], template: str, expected: str
) -> None:
    """And never replaces anything for it, even without a version counter."""
    naming = Naming(template, rescue="template", version_counter=False)
    policy = Policy(EACH, [KeepLast(1)], name=naming, last="link")
    assert expected == decide_rescue(policy, observation(7, loss=0.5), manifest(records), "SIGTERM").name


def test_a_regular_save_takes_the_name_of_a_rescue_over() -> None:
    """It retires the rescue, so that the name needs no version."""
    policy = Policy(EACH, [KeepLast(1)], name=Naming("model", rescue="template"))
    seen = manifest([record(name="model.ckpt", step=2, kind="rescue")])
    decision = decide(policy, observation(3), seen)
    assert isinstance(decision, Save)
    assert ("model.ckpt", True) == (decision.name, decision.replaces)


def test_the_first_regular_save_retires_the_rescue() -> None:
    """Until then it is kept as the newest; it is never ranked."""
    policy = Policy(EACH, [BEST])
    seen = manifest([*history(1.0), record(step=2, kind="rescue", metrics={"loss": 0.1}, reason="rescue: SIGTERM")])
    assert ("rescue: SIGTERM",) == explain(policy, seen)["s2"]
    assert ("s1", "s2") == saved(decide(policy, observation(3, loss=0.5), seen)).retire
    assert not decide(policy, observation(3, loss=5.0), seen)


def test_a_rescue_is_not_attached_to() -> None:
    """Reaching the rescued step regularly saves it regularly."""
    seen = manifest([record(step=2, kind="rescue")])
    decision = saved(decide(Policy(EACH, [KeepLast(1)]), observation(2), seen, since=Progress()))
    assert ("s2",) == decision.retire


# ---------------------------------------------------------------- the value itself


def test_a_policy_reads_as_a_sentence() -> None:
    """Printing a policy says all that it does."""
    policy = Policy(
        AnyOf(EverySteps(10)),
        [KeepEvery(steps=100), Budget(bytes=5)],
        last="copy",
        contents="weights",
        rescue=False,
    )
    assert (
        "save every 10 steps; keep one every 100 steps, at most 5 B; last.ckpt is a copy of the newest checkpoint, so "
        "every due checkpoint is saved, even if no rule keeps it; weights only; no rescue on exceptions"
    ) == str(policy)
    assert "save every step; keep nothing" == str(Policy(EACH, []))


def test_known_metrics_are_those_that_rules_name() -> None:
    """A score's own name is not a metric."""

    def score(metrics: Mapping[str, float]) -> float:
        return metrics["a"]

    policy = Policy(EACH, [BEST, KeepBest(1, score, mode="max"), KeepLast(1)])
    assert {"loss"} == policy.known_metrics
    assert "loss" == (policy.ranking and policy.ranking.name)


def test_one_rule_needs_no_list() -> None:
    """A rule alone is a list of one."""
    assert Policy(EACH, [BEST]) == Policy(EACH, BEST)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"when": 10}, r"Policy\.when is 10; expected a trigger"),
        ({"when": EverySteps}, r"Policy\.when is <class"),
        ({"keep": [3]}, r"Policy\.keep has 3; expected rules"),
        ({"keep": [KeepLast]}, r"Policy\.keep has <class"),
        ({"name": 3}, r"Policy\.name is 3; expected a template"),
        ({"last": True}, r"Policy\.last is True; expected None or 'link' or 'copy'"),
        ({"best": "link"}, r"Policy\.best is 'link', but no rule ranks; add KeepBest"),
        ({"contents": "all"}, r"Policy\.contents is 'all'"),
        ({"rescue": 1}, r"Policy\.rescue is 1; expected True or False"),
        (
            {"keep": [BEST], "last": "link", "best": "link", "name": Naming(best="last")},
            "the last and best aliases are both 'last'; name them apart",
        ),
    ],
)
def test_a_policy_that_means_nothing_is_refused(arguments: dict[str, Any], message: str) -> None:
    """The error names the argument, the value and what was expected."""
    valid: dict[str, Any] = {"when": EACH, "keep": [KeepLast(1)]}
    with pytest.raises(PolicyError, match=message):
        Policy(**valid | arguments)
