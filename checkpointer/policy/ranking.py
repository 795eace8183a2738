"""A metric gives records a total order: best first, NaN last, missing not ranked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from operator import itemgetter
from typing import Any, Literal, Protocol

import attrs

from checkpointer._validation import one_of
from checkpointer.errors import ObservationError, PolicyError
from checkpointer.records.record import Observation, Record, as_metrics, in_commit_order

Score = Callable[[Mapping[str, float]], Any]


Ties = Literal["older", "newest", "incumbent"]


class Ranking(Protocol):
    """Puts records in order, best first: a `Metric`, or a `KeepBest` that leaves out its warm-up."""

    def ranked(self, records: Iterable[Record]) -> list[Record]:
        """Return the records that are ranked, best first."""
        ...


def _check_key(instance: object, field: object, value: Any) -> None:
    if (isinstance(value, str) and value) or callable(value):
        return
    msg = f"metric is {value!r}; expected a metric's name or a function of the metrics"
    raise PolicyError(msg)


@attrs.frozen
class Metric:
    """A metric with a direction, and thereby a total order over records.

    ``min`` ranks the smallest value first, ``max`` the largest. After every proper number comes a *diverged best*
    (``-inf`` under ``min``, ``inf`` under ``max``: no real run is that good), after it NaN. A record without the
    metric is not ranked at all. Equal values rank the older record first, unless ``ties="newest"``.

    Args:
        key: A metric's name (``"epoch"`` and ``"step"`` always exist), or a named function that computes a score
            from the metrics; a ``KeyError`` it raises means that a metric it needs is missing.
        mode: ``"min"`` or ``"max"``.
        ties: Which record ranks first among equals, ``"older"`` (so for ``"incumbent"``: see `KeepBest`), ``"newest"``.

    Raises:
        PolicyError: If an argument is none of these, or ``key`` is a lambda (give a score a name).

    Example:
        >>> from checkpointer import Metric
        >>> def f1(metrics):
        ...     p, r = metrics["precision"], metrics["recall"]
        ...     return 2 * p * r / (p + r)
        >>> Metric(f1, mode="max").name
        'f1'
    """

    key: str | Score = attrs.field(validator=_check_key)
    mode: Literal["min", "max"] = attrs.field(validator=one_of("min", "max"), kw_only=True)
    ties: Ties = attrs.field(default="older", validator=one_of("older", "newest", "incumbent"), kw_only=True)

    def __attrs_post_init__(self) -> None:
        if callable(self.key) and self.name in ("", "<lambda>"):
            msg = f"metric is the unnamed function {self.key!r}; define it with def, so that reasons can name it"
            raise PolicyError(msg)

    @property
    def name(self) -> str:
        """The metric's name, or the score function's."""
        return self.key if isinstance(self.key, str) else getattr(self.key, "__name__", "")

    def value(self, record: Record | Observation) -> float | None:
        """Return the record's score, or None if what it needs was not reported."""
        if isinstance(self.key, str):
            if self.key in record.metrics:
                return record.metrics[self.key]
            return float(getattr(record, self.key)) if self.key in ("step", "epoch") else None
        try:
            score = self.key(record.metrics)
        except KeyError:
            return None
        except Exception as error:
            msg = f"score {self.name!r} failed on {dict(record.metrics)!r}: {error!r}; fix the function"
            raise ObservationError(msg) from error
        return as_metrics({self.name: score})[self.name]

    def scored(self, records: Iterable[Record]) -> list[tuple[float, Record]]:
        """Return the records that have the metric, each with its score; the smaller is the better (see `place`)."""
        sign, key = 1.0 if self.mode == "min" else -1.0, self.key
        if isinstance(key, str) and key not in ("step", "epoch"):
            # As `value` does, without a call for each of many records.
            return [(sign * value, record) for record in records if (value := record.metrics.get(key)) is not None]
        return [(sign * value, record) for record in records if (value := self.value(record)) is not None]

    def ranked(self, records: Iterable[Record]) -> list[Record]:
        """Return the records that have the metric, best first."""
        scored = self.scored(in_commit_order(records))
        if self.ties == "newest":
            scored.reverse()
        # A sort leaves equals in the order in which they are.
        proper = sorted([one for one in scored if one[0] > -math.inf], key=itemgetter(0))
        others = sorted([one for one in scored if not one[0] > -math.inf], key=lambda one: place(one[0]))
        return [record for _, record in (*proper, *others)]

    def __str__(self) -> str:
        return f"{self.name} ({self.mode})"


def place(score: float) -> tuple[int, float]:
    """Return what sorts the scores of `Metric.scored`, best first: proper numbers, then ``-inf``, then NaN."""
    if score > -math.inf:
        return 0, score
    return (1, 0.0) if score == -math.inf else (2, 0.0)  # NaN does not compare.
