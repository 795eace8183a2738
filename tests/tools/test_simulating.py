"""What a policy would have done: `simulate` decides as a manager does, and reads what loggers write."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.commands import command, train

from checkpointer import (
    AnyOf,
    Budget,
    CheckpointManager,
    Continuous,
    EveryEpochs,
    EveryFraction,
    EverySeconds,
    EverySteps,
    KeepAll,
    KeepBest,
    KeepEvery,
    KeepFor,
    KeepLast,
    KeepWhere,
    Naming,
    Observation,
    Policy,
    Progress,
    Record,
    When,
)
from checkpointer.errors import ObservationError
from checkpointer.policy.decide import Save
from checkpointer.testing import FakeClock
from checkpointer.tools.history import History, history_of, read_history
from checkpointer.tools.simulate import simulate

BEST = KeepBest(2, "loss", mode="min")


def history(*losses: float | None, every: int = 10) -> History:
    """Return a report each ten steps, an epoch each two reports."""
    observations = [
        Observation(
            metrics={} if loss is None else {"loss": loss},
            step=number * every,
            epoch=(number - 1) // 2,
            epoch_end=not number % 2,
            time=float(number),
        )
        for number, loss in enumerate(losses, start=1)
    ]
    return History(observations=tuple(observations))


# The law: what is simulated is what happens


def is_odd(now: Progress) -> bool:
    """Return whether the step is odd."""
    return now.step % 2 == 1


def is_of_odd_step(record: Record) -> bool:
    """Return whether the step of a checkpoint is odd."""
    return record.step % 2 == 1


triggers = st.sampled_from(
    [
        *(EverySteps(10), EverySteps(25), EveryEpochs(1), EverySeconds(3), AnyOf(EverySteps(30), EveryEpochs(2))),
        *(EveryFraction(0.25, of=90), When(is_odd), Continuous(1.5)),
    ]
)
rules = st.lists(
    st.sampled_from(
        [
            *(BEST, KeepLast(1), KeepLast(3), KeepEvery(steps=40), KeepBest(1, "acc", mode="max"), KeepAll()),
            *(KeepFor(2), KeepWhere(is_of_odd_step)),
        ]
    ),
    min_size=1,
    max_size=3,
    unique=True,
)
names = st.sampled_from(
    [Naming(), Naming("{epoch}", version_counter=False), Naming("{step}-{loss:.2f}", missing="zero")]
)
aliases = st.sampled_from([None, "link", "copy"])


@st.composite
def reports(draw: st.DrawFn) -> list[Observation]:
    """Draw what a loop reports: steps that rise or stay, metrics that come and go."""
    found: list[Observation] = []
    step, time = 0, 0.0
    for number in range(draw(st.integers(1, 12))):
        step += draw(st.sampled_from([0, 7, 10, 33])) if number else 10
        time += draw(st.sampled_from([0.5, 2.0]))
        measured = draw(st.dictionaries(st.sampled_from(["loss", "acc"]), st.sampled_from([0.1, 0.5, float("nan")])))
        ends = draw(st.booleans())
        epoch = found[-1].epoch + found[-1].epoch_end if found and found[-1].step != step else 0
        epoch = found[-1].epoch if found and found[-1].step == step else epoch
        found.append(Observation(metrics=measured, step=step, epoch=epoch, epoch_end=ends, time=time))
    return found


@pytest.mark.filterwarnings("ignore::checkpointer.CheckpointerWarning")
@settings(max_examples=150)
@given(triggers, rules, names, aliases, aliases, reports())
def test_a_simulation_keeps_what_a_manager_keeps(
    when: Any, keep: list[Any], name: Naming, last: Any, best: Any, seen: list[Observation]
) -> None:
    """At every step, by name: there is one `decide`, and no second opinion."""
    best = best if any(isinstance(rule, KeepBest) for rule in keep) else None
    policy = Policy(when, keep, name=name, last=last, best=best)
    clock = FakeClock(seen[0].time)
    timeline = simulate(policy, History(observations=tuple(seen)))
    done, kept = [], []
    with CheckpointManager(None, policy, state=dict, clock=clock) as manager:
        for now in seen:
            clock.advance(now.time - clock.time())
            decision = manager.session.decide(now.metrics, now.step, now.epoch, epoch_end=now.epoch_end)
            done.append(manager.session.commit(decision))
            kept.append([record.name for record in manager.records])
    assert [type(decision) for decision in done] == [type(moment.decision) for moment in timeline.moments]
    saved = [decision.name for decision in done if isinstance(decision, Save)]
    assert saved == [m.decision.name for m in timeline.moments if isinstance(m.decision, Save)]
    assert [len(names) for names in kept] == [moment.num_kept for moment in timeline.moments]
    assert kept[-1] == [record.name for record in timeline.manifest.records]


def test_a_budget_is_simulated_with_the_sizes_there_were() -> None:
    """An old run's records know them."""
    given = history(0.5, 0.4, 0.3)
    given = History(observations=given.observations, sizes={10: 100, 20: 300, 30: 100})
    timeline = simulate(Policy(EverySteps(10), [KeepAll(), Budget(bytes=250)]), given)
    assert [100, 300, 100] == [moment.bytes for moment in timeline.moments]
    assert 400 == timeline.peak_bytes


def test_what_would_be_lost_is_counted_up_to_the_moment_before_the_save() -> None:
    """The worst time for a crash is just before a checkpoint is there."""
    timeline = simulate(Policy(EverySteps(20), [KeepLast(1)]), history(1, 1, 1, 1, 1))
    assert [10, 20, 10, 20, 10] == [moment.lost_steps for moment in timeline.moments]
    worst = timeline.most_lost
    assert worst is not None
    assert (40, 20) == (worst.observation.step, worst.lost_steps)


def test_each_checkpoint_is_saved_and_retired_once() -> None:
    """From its save to its end."""
    timeline = simulate(Policy(EverySteps(10), [KeepLast(1)]), history(1, 1, 1))
    assert [(10, 20), (20, 30), (30, None)] == [(one.record.step, one.retired_at) for one in timeline.checkpoints]


# Reading metrics


def test_csv_with_gaps_is_read_as_loggers_write_it() -> None:
    """One line for each metric, empty where nothing was measured: Lightning's CSVLogger."""
    data = b"epoch,step,train_loss,val_loss\n0,49,0.9,\n0,99,0.8,\n0,99,,0.7\n1,149,0.6,\n"
    found = read_history(data, "metrics.csv")
    assert [(49, 0, False), (99, 0, True), (149, 1, True)] == [
        (now.step, now.epoch, now.epoch_end) for now in found.observations
    ]
    assert {"train_loss": 0.8, "val_loss": 0.7} == dict(found.observations[1].metrics)


def test_json_lines_are_read_as_trainers_write_them() -> None:
    """Hugging Face counts parts of epochs; a nested value is not a metric."""
    data = b'{"step": 10, "epoch": 0.5, "loss": 1.5, "note": null}\n\n{"step": 20, "epoch": 1.0, "h": [1, 2]}\n'
    found = read_history(data, "log.jsonl")
    assert [(10, 0), (20, 1)] == [(now.step, now.epoch) for now in found.observations]
    assert [{"loss": 1.5}, {}] == [dict(now.metrics) for now in found.observations]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "step,loss\n10,0.5\n20,oops\n",
            "line 3, column 'loss': 'oops' is not a number; correct the cell, or leave it empty",
        ),
        ("step,loss\n,0.5\n", "line 2: the column 'step' is empty; every line needs its step"),
        ("step,loss\n20,1\n10,1\n", "line 3: the step went back from 20 to 10"),
        ("stp,loss\n20,1\n", "has no column 'step' (did you mean 'stp'?)"),
        ("step,loss\n1.5,1\n", "line 2, column 'step': '1.5'; expected a whole number"),
        ("step,loss,loss\n1,1,1\n", "line 1: two columns have the name 'loss'"),
        ("step,loss\n1,1,1\n", "line 2: 3 cells, and the head has 2"),
        ("step,time\n1,inf\n", "the time is inf; expected seconds"),
        ("", "has no line of metrics; expected CSV with a head"),
        ('{"step": 1}\n{"step": 2\n', "line 2: it is not a JSON object"),
        ('{"step": 1}\n[1]\n', "line 2: found [1]; expected a JSON object"),
        ('{"step": 1, "loss": "bad"}\n', "line 1, column 'loss': 'bad' is not a number"),
        ("\1step", "has no line of metrics"),
    ],
)
def test_bad_metrics_are_reported_with_line_and_column(text: str, expected: str, tmp_path: Path) -> None:
    """The message says where to look among ten thousand lines."""
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    (tmp_path / "p.yaml").write_text(Policy(EverySteps(1), [KeepAll()]).to_yaml())
    said = command("simulate", path, "-p", tmp_path / "p.yaml")
    assert (2, "") == (said.code, said.out)
    assert expected in said.err
    assert f"checkpointer: {path}" in said.err


@pytest.mark.parametrize(
    ("when", "column"), [(EveryEpochs(1), "epoch"), (AnyOf(EverySteps(9), EverySeconds(60)), "time")]
)
def test_a_trigger_that_counts_an_absent_column_is_refused(when: Any, column: str) -> None:
    """It would never be due, and look like a policy that saves nothing."""
    with pytest.raises(ObservationError, match=f"the metrics have no column '{column}'"):
        simulate(Policy(when, [KeepAll()]), read_history(b"step,loss\n10,1\n", "metrics.csv"))


@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader(data: bytes) -> None:
    """It is a history or a message, never a traceback."""
    with contextlib.suppress(ObservationError):
        read_history(data, "metrics")


# The command


def test_simulate_prints_the_timeline_and_what_it_comes_to(tmp_path: Path) -> None:
    """A line for each due point, then the sums."""
    (tmp_path / "m.csv").write_text("step,epoch,loss\n10,0,0.9\n20,1,0.4\n30,2,0.6\n40,3,0.5\n")
    (tmp_path / "p.yaml").write_text(Policy(EverySteps(10), [BEST]).to_yaml())
    said = command("simulate", tmp_path / "m.csv", "-p", tmp_path / "p.yaml", "--size", "1.5MB")
    assert 0 == said.code
    lines = [" ".join(line.split()) for line in said.out.splitlines()]
    assert [
        "save every 10 steps; keep the best 2 by loss (min)",
        "step loss kept on disk at risk what",
        "10 0.9 1 1.5 MB 10 + epoch=0-step=10.ckpt",
        "20 0.4 2 3.0 MB 10 + epoch=1-step=20.ckpt",
        "30 0.6 2 3.0 MB 10 + epoch=2-step=30.ckpt",
        "- epoch=0-step=10.ckpt",
        "40 0.5 2 3.0 MB 10 + epoch=3-step=40.ckpt",
        "- epoch=2-step=30.ckpt",
        "4 observations: 4 saved, 2 retired, 2 kept; at most 4.5 MB on disk",
        "worst case: a crash at step 10 loses 10 steps",
        "best: epoch=1-step=20.ckpt, loss (min)",
    ] == lines


def test_an_old_run_is_played_from_its_records(tmp_path: Path) -> None:
    """What another policy would have done with what is left of it, sizes included."""
    folder = train(tmp_path / "run", 0.9, 0.2, 0.5, policy=Policy(EverySteps(1), [KeepAll()]))
    (tmp_path / "p.yaml").write_text(Policy(EverySteps(20), [KeepLast(1)]).to_yaml())
    data = command("simulate", folder, "-p", tmp_path / "p.yaml", "--json").data
    assert [(10, "skip"), (20, "save"), (30, "skip")] == [(m["step"], m["decision"]) for m in data["moments"]]
    assert (folder / "epoch=1-step=20.ckpt").stat().st_size == data["peak_bytes"]


def test_a_history_of_no_records_is_empty() -> None:
    """And plays to nothing."""
    timeline = simulate(Policy(EverySteps(1), [KeepAll()]), history_of([]))
    assert ((), None, 0) == (timeline.moments, timeline.most_lost, timeline.peak_bytes)


ROOT = Path(__file__).parents[2]


def test_of_an_old_run_only_the_survivors_are_known_and_the_steps_at_risk_are_not(tmp_path: Path) -> None:
    """They would be the gaps between survivors. A file of metrics without a size has no bytes on disk."""
    folder = train(tmp_path / "run", *[1 / n for n in range(1, 9)])
    policy, metrics = tmp_path / "p.yaml", tmp_path / "m.csv"
    Policy(EverySteps(10), [KeepAll()]).to_yaml(policy)
    said = command("simulate", folder, "--policy", policy)
    assert (0, False, False) == (said.code, "at risk  " in said.out, "worst case" in said.out), said
    assert "only the 2 survivors of the run are known" in said.out
    data = command("simulate", folder, "--policy", policy, "--json").data
    assert ({None}, None) == ({moment["lost_steps"] for moment in data["moments"]}, data["most_lost"])
    assert all(moment["bytes"] > 0 for moment in data["moments"])
    metrics.write_text("step,loss\n10,0.5\n20,0.4\n")
    said = command("simulate", metrics, "--policy", policy)
    assert (True, False) == ("the size on disk is not known" in said.out, "0 B" in said.out), said
    assert None is command("simulate", metrics, "--policy", policy, "--json").data["peak_bytes"]


def test_the_page_on_choosing_shows_what_simulate_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the metrics of the digits run, in 80 columns."""
    recorded = re.search(
        r"```console\n\$ checkpointer (simulate .*?)\n(.*?)\n```", (ROOT / "docs/choosing.md").read_text(), re.S
    )
    assert recorded is not None
    monkeypatch.chdir(ROOT)
    said = command(*recorded[1].split(), columns=80)
    assert recorded[2].splitlines() == [line.rstrip() for line in said.out.splitlines()]
    assert max(map(len, recorded[2].splitlines())) <= 80


def test_the_policy_files_of_the_examples_can_be_read() -> None:
    """And are what the example trains with."""
    for path in sorted((ROOT / "examples").glob("*.yaml")):
        assert Policy.from_yaml(path)


@pytest.mark.parametrize(
    "text",
    [
        ",".join(map(str, range(30_000))) + ",29999\n1\n",
        ",".join(map(str, range(30_000))) + "\n1\n",
        "\n".join(f'{{"step": 1, "m{number}": 1}}' for number in range(20_000)),
    ],
    ids=["a name twice", "no step", "lines of one step"],
)
def test_very_many_columns_take_time_by_their_number_not_its_square(text: str) -> None:
    """The limit of time is that of the corpus: see `test_limits.py`."""
    begin = time.process_time()
    with contextlib.suppress(ObservationError):
        (now,) = read_history(text.encode(), "f").observations
        assert 20_000 == len(now.metrics)
    assert time.process_time() - begin < 5


@pytest.mark.parametrize(("column", "value"), [("step", "1e300"), ("epoch", str(2**63)), ("time", "1e300")])
def test_counts_and_times_that_no_record_has_are_refused(column: str, value: str) -> None:
    """The message has the line."""
    row = {"step": "1", "epoch": "0", "time": "0"} | {column: value}
    with pytest.raises(ObservationError, match="f, line 2"):
        read_history(f"{','.join(row)}\n{','.join(row.values())}\n".encode(), "f")
