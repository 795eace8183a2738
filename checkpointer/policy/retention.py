"""Retention rules name the records they keep; limits take away from what the rules keep."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, overload, runtime_checkable

import attrs

from checkpointer._display import every_text, size_text
from checkpointer._validation import as_seconds, ask, named_function, whole_number
from checkpointer.errors import PolicyError
from checkpointer.policy.ranking import Metric, Ranking, Score, Ties, place
from checkpointer.records.record import Ordered, Record, in_commit_order


@runtime_checkable
class Rule(Protocol):
    """Names the records to keep. One method: a list of rules is their union, so none needs to know another."""

    def keep(self, history: Sequence[Record]) -> Mapping[str, str]:
        """Return the names to keep, each with a short reason.

        ``history`` is every record of the run that counts, oldest first, the candidate last while a save is being
        decided. Must depend on it alone: what an interrupted retire left over heals at the next save that way. Name
        the most important first: before a checkpoint is deleted, the manager checks that these still exist.
        """
        ...


@runtime_checkable
class Limit(Protocol):
    """Takes away from what the rules keep, such as a budget of bytes."""

    def drop(self, kept: Sequence[Record], ranking: Ranking | None) -> Mapping[str, str]:
        """Return the names to drop from ``kept`` (oldest first), each with the reason."""
        ...


@attrs.frozen(init=False)
class KeepBest:
    """Keep the ``k`` best by a metric. A record without the metric is not ranked and not kept by this rule.

    Args:
        k: How many, at least 1.
        metric: A metric's name, a named function of the metrics that returns a score, or a whole `Metric`.
        mode: ``"min"`` or ``"max"``; left out with a `Metric`, which says it.
        ties: Which of two records with equal scores ranks better: ``"older"`` or ``"newest"``. With ``"incumbent"`` a
            new record does not replace a kept record of the same score. When a better record comes, and the worst kept
            records are equal, the oldest of them is removed.
        after_step: Records up to and including this step are not ranked (warm-up).

    Raises:
        PolicyError: If ``mode`` is missing, if ``mode`` or ``ties`` is given beside a `Metric`, or if a number is out
            of its range.

    Example:
        >>> from checkpointer import KeepBest
        >>> print(KeepBest(3, "val_loss", mode="min"))
        the best 3 by val_loss (min)
    """

    k: int = attrs.field(validator=whole_number(1))
    metric: Metric
    after_step: int = attrs.field(default=0, validator=whole_number(0))

    @overload
    def __init__(self, k: int, metric: Metric, *, after_step: int = 0) -> None: ...

    @overload
    def __init__(
        self, k: int, metric: str | Score, *, mode: Literal["min", "max"], ties: Ties = "older", after_step: int = 0
    ) -> None: ...

    def __init__(
        self,
        k: int,
        metric: str | Score | Metric,
        *,
        mode: Literal["min", "max"] | None = None,
        ties: Ties = "older",
        after_step: int = 0,
    ) -> None:
        if not isinstance(metric, Metric):
            metric = Metric(metric, mode=mode, ties=ties)  # type: ignore[arg-type]  # None is refused there
        elif mode is not None or ties != "older":
            msg = f"KeepBest has the metric {metric} and mode={mode!r}, ties={ties!r}; say these in the Metric alone"
            raise PolicyError(msg)
        self.__attrs_init__(k, metric, after_step)

    def keep(self, history: Sequence[Record]) -> Mapping[str, str]:
        """See `Rule.keep`; best first."""
        best = [record.name for record in self.top(history)]
        rule = str(self)
        return {name: f"#{place} of {rule}" if self.k > 1 else rule for place, name in enumerate(best, start=1)}

    def top(self, history: Iterable[Record]) -> list[Record]:
        """Return the records this rule keeps, best first; ``history`` is oldest first."""
        if self.metric.ties == "incumbent":
            return self.metric.ranked(self._incumbents(history))
        return self.ranked(history)[: self.k]

    def ranked(self, records: Iterable[Record]) -> list[Record]:
        """Return the records this rule ranks, best first."""
        return self.metric.ranked(self.eligible(records))

    def best(self, records: Iterable[Record]) -> Record | None:
        """Return the record this rule ranks first, or None if it ranks none."""
        return next(iter(self.ranked(records)), None)

    def eligible(self, records: Iterable[Record]) -> Iterable[Record]:
        """Return the records that may be ranked, if they have the metric."""
        if not self.after_step:
            return records
        return Ordered([record for record in in_commit_order(records) if record.step > self.after_step])

    def _incumbents(self, history: Iterable[Record]) -> list[Record]:
        """Return the records that hold a place among the best if an equal takes none, in any order."""
        heap: list[tuple[int, float, int, Record]] = []  # The worst first, and the oldest of those.
        for number, (score, record) in enumerate(self.metric.scored(self.eligible(history))):
            kind, value = place(score)
            item = (-kind, -value, number, record)
            if len(heap) < self.k:
                heapq.heappush(heap, item)
            elif item[:2] > heap[0][:2]:
                heapq.heapreplace(heap, item)
        return [record for *_, record in heap]

    def __str__(self) -> str:
        after = f" after step {self.after_step}" if self.after_step else ""
        return f"the best{f' {self.k}' if self.k > 1 else ''} by {self.metric}{after}"


@attrs.frozen
class KeepLast:
    """Keep the newest ``n``, in the order they were committed.

    Args:
        n: How many, at least 1.

    Example:
        >>> from checkpointer import KeepLast
        >>> print(KeepLast(2))
        the last 2
    """

    n: int = attrs.field(validator=whole_number(1))

    def keep(self, history: Sequence[Record]) -> Mapping[str, str]:
        """See `Rule.keep`; newest first."""
        return dict.fromkeys((record.name for record in reversed(history[-self.n :])), str(self))

    def __str__(self) -> str:
        return f"the last {self.n}" if self.n > 1 else "the newest"


def _as_seconds(value: Any) -> float:
    return as_seconds(value, "the interval of the rule", above_zero=True)


@attrs.frozen(kw_only=True)
class KeepEvery:
    """Keep one record of each interval for good, so that a long history stays evenly spaced.

    With ``steps`` or ``epochs`` the first record at or after each multiple is kept. With ``seconds`` the first record
    is kept, and then each record that is at least ``seconds`` later than the last kept one. If the clock was set back,
    a record may be earlier than the last kept one. Then this record is kept, and the interval begins anew.

    Args:
        steps: Steps per interval, at least 1.
        epochs: Finished epochs per interval, at least 1.
        seconds: Seconds per interval, more than 0, or a `datetime.timedelta`.

    Raises:
        PolicyError: Unless exactly one of the three is given.

    Example:
        >>> from checkpointer import KeepEvery
        >>> print(KeepEvery(steps=10_000))
        one every 10000 steps
    """

    steps: int | None = attrs.field(default=None, validator=attrs.validators.optional(whole_number(1)))
    epochs: int | None = attrs.field(default=None, validator=attrs.validators.optional(whole_number(1)))
    seconds: float | None = attrs.field(default=None, converter=attrs.converters.optional(_as_seconds))

    def __attrs_post_init__(self) -> None:
        given = [name for name in ("steps", "epochs", "seconds") if getattr(self, name) is not None]
        if len(given) != 1:
            msg = f"KeepEvery got {' and '.join(given) or 'nothing'}; pass exactly one of steps, epochs, seconds"
            raise PolicyError(msg)

    def keep(self, history: Sequence[Record]) -> Mapping[str, str]:
        """See `Rule.keep`."""
        kept = self._spaced(history) if self.seconds is not None else self._first_of_each(history)
        return dict.fromkeys((record.name for record in kept), str(self))

    def _first_of_each(self, history: Sequence[Record]) -> Iterable[Record]:
        first: dict[int, Record] = {}
        for record in history:
            interval = record.step // self.steps if self.steps else record.progress.epochs // (self.epochs or 1)
            if interval:
                first.setdefault(interval, record)
        return first.values()

    def _spaced(self, history: Sequence[Record]) -> list[Record]:
        assert self.seconds is not None
        kept: list[Record] = []
        for record in history:
            if not kept or not 0 <= record.time - kept[-1].time < self.seconds:
                kept.append(record)
        return kept

    def __str__(self) -> str:
        if self.seconds is not None:
            return f"one every {self.seconds:g} s"
        return f"one {every_text(self.steps, 'step') if self.steps else every_text(self.epochs or 1, 'epoch')}"


@attrs.frozen
class KeepFor:
    """Keep each checkpoint for some time, counted back from the newest one.

    While training stands still nothing gets older. A clock that was set back keeps more, not less.

    Args:
        seconds: More than 0, or a `datetime.timedelta`.

    Example:
        >>> from datetime import timedelta
        >>> from checkpointer import KeepFor
        >>> print(KeepFor(timedelta(hours=6)))
        those of the last 21600 s
    """

    seconds: float = attrs.field(converter=_as_seconds)

    def keep(self, history: Sequence[Record]) -> Mapping[str, str]:
        """See `Rule.keep`; newest first."""
        newest = history[-1].time if history else 0.0
        return {record.name: str(self) for record in reversed(history) if newest - record.time < self.seconds}

    def __str__(self) -> str:
        return f"those of the last {self.seconds:g} s"


@attrs.frozen
class KeepWhere:
    """Keep the checkpoints of which a function says so.

    Args:
        predicate: A named function. It gets a `Record` and returns whether it is kept. It must depend on that alone.

    Raises:
        PolicyError: If it is not a function with a name of its own (a lambda has none).

    Example:
        >>> from checkpointer import KeepWhere
        >>> def round_epochs(record):
        ...     return record.epoch % 10 == 9
        >>> print(KeepWhere(round_epochs))
        each with round_epochs
    """

    predicate: Callable[[Record], object] = attrs.field(validator=named_function)

    def keep(self, history: Sequence[Record]) -> Mapping[str, str]:
        """See `Rule.keep`; newest first."""
        return {record.name: str(self) for record in reversed(history) if ask(self.predicate, record)}

    def __str__(self) -> str:
        return f"each with {self.predicate.__name__}"


@attrs.frozen
class KeepAll:
    """Keep every record.

    Example:
        >>> from checkpointer import KeepAll
        >>> print(KeepAll())
        everything
    """

    def keep(self, history: Sequence[Record]) -> Mapping[str, str]:
        """See `Rule.keep`."""
        return dict.fromkeys((record.name for record in history), str(self))

    def __str__(self) -> str:
        return "everything"


@attrs.frozen(kw_only=True)
class Budget:
    """Limit the bytes kept: the worst-ranked go first, never the newest, the best or a pinned one.

    If the policy has a `KeepBest`, the first one ranks the records. Records that it does not rank are removed first,
    the oldest before the newer ones. Then the ranked records are removed, the worst first. Without a `KeepBest` the
    oldest are removed first. A save is decided before its size is known, so it is counted with the size of the save
    before it. If it is larger, the budget is exceeded until the next save.

    Args:
        bytes: Bytes of all payloads together, at least 1.

    Raises:
        PolicyError: If ``bytes`` is not a whole number of at least 1.

    Example:
        >>> from checkpointer import Budget
        >>> print(Budget(bytes=20 * 10**9))
        at most 20 GB
    """

    bytes: int = attrs.field(validator=whole_number(1))

    def drop(self, kept: Sequence[Record], ranking: Ranking | None) -> Mapping[str, str]:
        """See `Limit.drop`."""
        excess = sum(record.size for record in kept) - self.bytes
        if excess <= 0:
            return {}
        ranked = [] if ranking is None else ranking.ranked(kept)
        names = {record.name for record in ranked}
        safe = {record.name for record in (*ranked[:1], *kept[-1:])}
        dropped: dict[str, str] = {}
        for record in (*(record for record in kept if record.name not in names), *reversed(ranked)):
            if excess <= 0:
                break
            if not record.pinned and record.name not in safe:
                dropped[record.name] = str(self)
                excess -= record.size
        return dropped

    def __str__(self) -> str:
        return f"at most {size_text(self.bytes).replace('.0 ', ' ')}"
