"""A metric gives records a total order: best first, NaN last, missing not ranked."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, Protocol

import attrs

from checkpointer._validation import one_of
from checkpointer.errors import ObservationError, PolicyError
from checkpointer.records.record import Observation, Record, as_metrics

Score = Callable[[Mapping[str, float]], Any]


Ties = Literal["older", "newest", "incumbent"]
Place = tuple[int, float, int, float, str, str, Record]


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

    def places(self, records: Iterable[Record]) -> Iterator[Place]:
        """Yield what sorts each record that has the metric, best first; the record itself comes last."""
        sign, is_newest, inf = 1.0 if self.mode == "min" else -1.0, self.ties == "newest", math.inf
        is_reported = isinstance(self.key, str) and self.key not in ("step", "epoch")
        for record in records:
            # As `value` does, without a call for each of many records.
            value = record.metrics.get(self.key) if is_reported else self.value(record)  # type: ignore[arg-type]
            if value is None:
                continue
            value = sign * value + 0.0  # -0.0 and 0.0 are one value, so that a tie is a tie.
            kind = 0 if value > -inf else 1 if value == -inf else 2
            age = -record.serial if is_newest else record.serial
            # NaN does not compare.
            yield kind, value if kind < 2 else 0.0, age, record.time, record.token, record.name, record

    def ranked(self, records: Iterable[Record]) -> list[Record]:
        """Return the records that have the metric, best first."""
        return [place[-1] for place in sorted(self.places(records))]

    def best(self, k: int, records: Iterable[Record]) -> list[Record]:
        """Return the first ``k`` of `ranked`, without sorting all records."""
        return [place[-1] for place in heapq.nsmallest(k, [*self.places(records)])]

    def __str__(self) -> str:
        return f"{self.name} ({self.mode})"
