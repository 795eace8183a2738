"""A metric gives records a total order: best first, NaN last, missing not ranked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import takewhile
from typing import Any, Final, Literal, Protocol

import attrs

from checkpointer._validation import one_of
from checkpointer.errors import ObservationError, PolicyError
from checkpointer.policy.ledger import commit_order, ledger_of
from checkpointer.policy.ordered import Key
from checkpointer.records.record import Observation, Record, as_metrics

__all__ = ["Metric", "Ranking", "Ties", "is_ranked", "merit", "ranked_by", "unranked"]

Score = Callable[[Mapping[str, float]], Any]


Ties = Literal["older", "newest", "incumbent"]


class Ranking(Protocol):
    """Puts records in order, best first: a `Metric`, or a `KeepBest` that leaves out its warm-up."""

    def ranked(self, records: Iterable[Record]) -> list[Record]:
        """Return the records that are ranked, best first."""
        ...

    def sort_key(self, record: Record) -> Key:
        """Return the key that sorts the best first, and behind the ranked all others, the oldest last."""
        ...


_UNRANKED: Final = 3
"""Begins the key of a record that has no place in the ranking: behind numbers, diverged ones and NaN."""


def unranked(record: Record) -> Key:
    """Return the sort key of a record that is not ranked."""
    return _UNRANKED, -record.serial, -record.time, record.token, record.name


def is_ranked(key: Key) -> bool:
    """Return whether the record with this sort key has a place in the ranking."""
    return bool(key[0] != _UNRANKED)


def merit(key: Key) -> Key:
    """Return the part of a ranked record's sort key that its equals share: the smaller, the better."""
    return key[:2]


def ranked_by(ranking: Ranking, records: Iterable[Record]) -> Iterator[Record]:
    """Yield the records that are ranked, best first."""
    return takewhile(lambda record: is_ranked(ranking.sort_key(record)), ledger_of(records).by(ranking))


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

    def sort_key(self, record: Record) -> Key:
        """Return the key that sorts records best first; see `is_ranked` for those without the metric."""
        value = self.value(record)
        if value is None:
            return unranked(record)
        return (*self._merit(value), -record.serial if self.ties == "newest" else record.serial, *commit_order(record))

    def _merit(self, value: float) -> tuple[int, float]:
        if math.isnan(value):
            return 2, 0.0
        # -0.0 and 0.0 are one value, so that a tie is a tie.
        signed = (value if self.mode == "min" else -value) + 0.0
        return (1 if signed == -math.inf else 0), signed

    def ranked(self, records: Iterable[Record]) -> list[Record]:
        """Return the records that have the metric, best first."""
        return list(ranked_by(self, records))

    def __str__(self) -> str:
        return f"{self.name} ({self.mode})"
