"""A metric is a total order: best first, then a diverged best, NaN last, missing not ranked."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import pytest
from support.factories import history, observation, record

from checkpointer.errors import MetricError, ObservationError, PolicyError
from checkpointer.policy.ranking import Metric

nan, inf = math.nan, math.inf


def _names(metric: Metric, *losses: float | None) -> list[str]:
    return [r.name for r in metric.ranked(history(*losses))]


@pytest.mark.parametrize(
    ("mode", "losses", "expected"),
    [
        ("min", (3.0, 1.0, 2.0), ["s2", "s3", "s1"]),
        ("max", (3.0, 1.0, 2.0), ["s1", "s3", "s2"]),
        ("min", (nan, 1.0), ["s2", "s1"]),
        ("max", (nan, 1.0), ["s2", "s1"]),
        ("min", (inf, 1.0, nan), ["s2", "s1", "s3"]),
        ("max", (-inf, 1.0, nan), ["s2", "s1", "s3"]),
        ("min", (nan, -inf, inf, 1.0), ["s4", "s3", "s2", "s1"]),
        ("max", (nan, inf, -inf, 1.0), ["s4", "s3", "s2", "s1"]),
        ("min", (None, 1.0, None), ["s2"]),
        ("min", (None,), []),
        ("min", (), []),
        ("min", (0.0, -0.0), ["s1", "s2"]),
        ("max", (0.0, -0.0), ["s1", "s2"]),
        ("max", (-0.0, 0.0), ["s1", "s2"]),
        ("min", (nan, nan), ["s1", "s2"]),
    ],
)
def test_ranks_best_first(mode: Any, losses: tuple[float | None, ...], expected: list[str]) -> None:
    """Numbers first, a diverged best behind them, NaN last, a missing metric nowhere."""
    assert expected == _names(Metric("loss", mode=mode), *losses)


@pytest.mark.parametrize("value", [1.0, nan, inf, -inf])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_ties_go_to_the_older_unless_said_otherwise(mode: Any, value: float) -> None:
    """Equal values rank by age, in the direction that was asked for."""
    assert ["s1", "s2"] == _names(Metric("loss", mode=mode), value, value)
    assert ["s2", "s1"] == _names(Metric("loss", mode=mode, ties="newest"), value, value)


def test_a_score_is_computed_from_the_metrics() -> None:
    """A named function of the metrics ranks as a metric of its name."""

    def gap(metrics: Mapping[str, float]) -> float:
        return metrics["val"] - metrics["train"]

    metric = Metric(gap, mode="min")
    assert "gap" == metric.name
    assert 0.25 == metric.value(record(metrics={"val": 0.5, "train": 0.25}))
    assert metric.value(record(metrics={"val": 0.5})) is None
    assert "gap (min)" == str(metric)


def test_a_score_that_fails_is_named() -> None:
    """A score's own exception is not lost in ours."""

    def ratio(metrics: Mapping[str, float]) -> float:
        return 1 / metrics["val"]

    with pytest.raises(ObservationError, match=r"score 'ratio' failed on \{'val': 0\.0\}.*ZeroDivisionError"):
        Metric(ratio, mode="min").value(record(metrics={"val": 0.0}))


def test_a_score_that_is_no_number_is_refused() -> None:
    """A score is held to what a metric is."""

    def label(metrics: Mapping[str, float]) -> str:
        return "good"

    with pytest.raises(MetricError, match="metric 'label' is 'good'"):
        Metric(label, mode="min").value(record())


def test_step_and_epoch_always_exist() -> None:
    """The two counts can be ranked by, and a reported metric of the name comes first."""
    assert 7.0 == Metric("step", mode="max").value(observation(7))
    assert 3.0 == Metric("epoch", mode="max").value(record(epoch=3))
    assert 0.5 == Metric("epoch", mode="max").value(record(epoch=3, metrics={"epoch": 0.5}))
    assert Metric("loss", mode="min").value(observation(7)) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"key": "", "mode": "min"}, "metric is ''; expected a metric's name"),
        ({"key": 3, "mode": "min"}, "metric is 3; expected a metric's name"),
        ({"key": "a", "mode": "auto"}, "Metric.mode is 'auto'; expected 'min' or 'max'"),
        (
            {"key": "a", "mode": "min", "ties": "first"},
            "ties is 'first'; expected 'older' or 'newest' or",
        ),
        ({"key": lambda metrics: 0.0, "mode": "min"}, "unnamed function .*define it with def"),
        ({"key": functools.partial(max), "mode": "min"}, "unnamed function .*define it with def"),
    ],
)
def test_a_metric_that_means_nothing_is_refused(arguments: dict[str, Any], message: str) -> None:
    """The error names the argument, the value and what was expected."""
    with pytest.raises(PolicyError, match=message):
        Metric(**arguments)
