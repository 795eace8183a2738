"""Retention rules name the records they keep; limits take away from what the rules keep.

`checkpointer.policy.reasons` puts them together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import chain, islice
from typing import Any, Literal, Protocol, cast, overload, runtime_checkable

import attrs

from checkpointer._validation import whole_number
from checkpointer.errors import PolicyError
from checkpointer.policy.ledger import Ledger, commit_order, ledger_of
from checkpointer.policy.ordered import Key, Ordered
from checkpointer.policy.ranking import Metric, Ranking, Score, Ties, is_ranked, merit, ranked_by, unranked
from checkpointer.records.record import Record

__all__ = ["Budget", "KeepAll", "KeepBest", "KeepEvery", "KeepLast", "Limit", "Rule"]


@runtime_checkable
class Rule(Protocol):
    """Names the records to keep. One method: a list of rules is their union, so none needs to know another."""

    def keep(self, history: Sequence[Record]) -> Mapping[str, str]:
        """Return the names to keep, each with the reason in a few words.

        ``history`` is every record of the run that counts, oldest first, the candidate last while a save is being
        decided. Must depend on it alone: what an interrupted retire left over heals at the next save that way.
        """
        ...


@runtime_checkable
class Limit(Protocol):
    """Takes away from what the rules keep, such as a budget of bytes."""

    def drop(self, kept: Sequence[Record], ranking: Ranking | None) -> Mapping[str, str]:
        """Return the names to drop from ``kept`` (oldest first), each with the reason."""
        ...


class Asked(Protocol):
    """A rule that can be asked about one record of very many, without going through the others."""

    def why(self, record: Record, history: Ledger) -> str | None:
        """Return why a record of the history is kept; None if it is not."""
        ...

    def kept(self, history: Ledger) -> Iterable[Record]:
        """Return all that it keeps."""
        ...

    def may_lose(self, before: Ledger, history: Ledger) -> Iterable[Record]:
        """Return at least those that were kept before ``history.change`` and are not any more.

        Each of them is asked about again: one too many costs time, one too few is retired a process later. Of the
        records that came themselves nothing need be said.
        """
        ...

    def instead_of(self, record: Record, history: Ledger) -> Iterable[Record]:
        """Return what is kept in the place of a record that is not kept, the most important first."""
        ...


@attrs.frozen(eq=False)
class Kept(Mapping[str, str]):
    """What a rule keeps, by name, with the reasons: worked out for those who are asked for.

    Example:
        >>> Kept(KeepAll(), Ledger())
        {}
    """

    rule: Asked
    history: Ledger

    def is_of(self, rule: Rule, history: Ledger) -> bool:
        """Return whether it is this very rule's answer about this very history, and not one that it passed on."""
        is_its: bool = self.rule is cast(Any, rule)
        return is_its and self.history is history

    def __getitem__(self, name: str) -> str:
        record = self.history.named(name)
        why = None if record is None else self.rule.why(record, self.history)
        if why is None:
            raise KeyError(name)
        return why

    def __iter__(self) -> Iterator[str]:
        return (record.name for record in self.rule.kept(self.history))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))


@attrs.frozen(init=False)
class KeepBest:
    """Keep the ``k`` best by a metric. A record without the metric is not ranked and not kept by this rule.

    Args:
        k: How many, at least 1.
        metric: A metric's name, a named function of the metrics that returns a score, or a whole `Metric`.
        mode: ``"min"`` or ``"max"``; left out with a `Metric`, which says it.
        ties: Which of two equals stays, ``"older"`` or ``"newest"``. ``"incumbent"``: a new one takes no place from its
            equal, but of the equals that are kept the older goes first when a better one comes.
        after_step: Records up to and including this step are not ranked (warm-up).

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
        self,
        k: int,
        metric: str | Score,
        *,
        mode: Literal["min", "max"],
        ties: Ties = "older",
        after_step: int = 0,
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
        """See `Rule.keep`."""
        return Kept(self, ledger_of(history))

    def why(self, record: Record, history: Ledger) -> str | None:
        """See `Asked.why`."""
        key = self.sort_key(record)
        if self.metric.ties == "incumbent":
            places = history.fold(_Incumbents(self)).places
            is_kept, place = places.get(key) is not None, places.rank(key)
        else:
            place = history.by(self).rank(key)
            is_kept = is_ranked(key) and place < self.k
        return f"#{place + 1} of {self}" if is_kept else None

    def kept(self, history: Ledger) -> list[Record]:
        """See `Asked.kept`; best first."""
        if self.metric.ties == "incumbent":
            return list(history.fold(_Incumbents(self)).places)
        return list(islice(ranked_by(self, history), self.k))

    def may_lose(self, before: Ledger, history: Ledger) -> Iterable[Record]:
        """See `Asked.may_lose`."""
        if self.metric.ties == "incumbent":
            return _pushed_out(before.fold(_Incumbents(self)), history.fold(_Incumbents(self)), history)
        return islice(history.by(self).starting_at(self.k), len(history.change.come))

    def instead_of(self, record: Record, history: Ledger) -> Iterable[Record]:
        """See `Asked.instead_of`."""
        if not is_ranked(self.sort_key(record)):
            return ()
        if self.metric.ties == "incumbent":
            return history.fold(_Incumbents(self)).places
        return islice(ranked_by(self, history), self.k)

    def top(self, history: Iterable[Record]) -> list[Record]:
        """Return the records this rule keeps, best first; ``history`` is oldest first."""
        return self.kept(ledger_of(history))

    def ranked(self, records: Iterable[Record]) -> list[Record]:
        """Return the records this rule ranks, best first."""
        return list(ranked_by(self, records))

    def best(self, records: Iterable[Record]) -> Record | None:
        """Return the record this rule ranks first, or None if it ranks none."""
        return next(ranked_by(self, records), None)

    def sort_key(self, record: Record) -> Key:
        """Return the key that sorts the best first, and behind the ranked all others, the oldest last."""
        return self.metric.sort_key(record) if self.ranks(record) else unranked(record)

    def ranks(self, record: Record) -> bool:
        """Return whether a record may be ranked, if it has the metric."""
        return record.step > self.after_step or not self.after_step

    def __str__(self) -> str:
        after = f" after step {self.after_step}" if self.after_step else ""
        return f"the best {self.k} by {self.metric}{after}"


@attrs.frozen
class _Places:
    """Who is kept by a rule for which it matters who came when."""

    places: Ordered[Record] = attrs.field(factory=Ordered)
    lost: tuple[Record, ...] = ()
    """Who lost a place to the one that came last."""
    is_tied: bool = False
    """Whether somebody without a place is as good as the worst that has one."""
    story: object = attrs.field(factory=object)
    """The same as long as one is what became of the other, record by record."""


def _pushed_out(before: _Places, now: _Places, history: Ledger) -> Iterable[Record]:
    """Return who may have lost a place by one change: all, if they are not of one story."""
    return now.lost if now.story is before.story and len(history.change.come) <= 1 else history


@attrs.frozen
class _Incumbents:
    """Who holds a place among the best if an equal takes it from nobody: best first."""

    rule: KeepBest = attrs.field(eq=id)

    def begin(self) -> _Places:
        return _Places()

    def take(self, state: _Places, record: Record) -> _Places:
        state = attrs.evolve(state, lost=())
        key, places = self.rule.sort_key(record), state.places
        if not is_ranked(key):
            return state
        if len(places) < self.rule.k:
            return attrs.evolve(state, places=places.put(key, record))
        worst = self._worst(places)
        if merit(key) >= worst:
            return attrs.evolve(state, is_tied=state.is_tied or merit(key) == worst)
        loser = places[places.rank(worst)]  # Of the worst the oldest.
        places = places.drop(self.rule.sort_key(loser)).put(key, record)
        # All that have no place were no better than the one that just lost its own.
        return attrs.evolve(state, places=places, lost=(loser,), is_tied=self._worst(places) == worst)

    def _worst(self, places: Ordered[Record]) -> Key:
        return merit(self.rule.sort_key(places[-1]))

    def untake(self, state: _Places, record: Record, *, is_newest: bool) -> _Places | None:
        # While the places are those of the k best, whatever came when, who has none makes no difference.
        has_place = state.places.get(self.rule.sort_key(record)) is not None
        return None if state.is_tied or has_place else state


@attrs.frozen
class KeepLast:
    """Keep the newest ``n``, in the order they were committed.

    Example:
        >>> from checkpointer import KeepLast
        >>> print(KeepLast(2))
        the last 2
    """

    n: int = attrs.field(validator=whole_number(1))

    def keep(self, history: Sequence[Record]) -> Mapping[str, str]:
        """See `Rule.keep`."""
        return Kept(self, ledger_of(history))

    def why(self, record: Record, history: Ledger) -> str | None:
        """See `Asked.why`."""
        first = history[max(len(history) - self.n, 0)]
        return str(self) if commit_order(record) >= commit_order(first) else None

    def kept(self, history: Ledger) -> Iterable[Record]:
        """See `Asked.kept`."""
        return history[-self.n :]

    def may_lose(self, before: Ledger, history: Ledger) -> Iterable[Record]:
        """See `Asked.may_lose`."""
        return history[-self.n - len(history.change.come) : -self.n]

    def instead_of(self, record: Record, history: Ledger) -> Iterable[Record]:
        """See `Asked.instead_of`."""
        return reversed(history[-self.n :])

    def __str__(self) -> str:
        return f"the last {self.n}"


def _optional_seconds(value: Any) -> Any:
    return value.total_seconds() if isinstance(value, timedelta) else value


def _positive_seconds(instance: object, field: object, value: Any) -> None:
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0):
        return
    msg = f"KeepEvery.seconds is {value!r}; expected more than 0, or a timedelta"
    raise PolicyError(msg)


@attrs.frozen(kw_only=True)
class KeepEvery:
    """Keep one record per interval for good, thinning a long history evenly.

    Per ``steps`` (or finished ``epochs``): the first record at or past each multiple. Per ``seconds``: the first
    record, and then each one at least that much later than the one kept before, or before it: a clock that was set
    back begins anew, where it would else keep nothing until it has caught up.

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
    seconds: float | None = attrs.field(default=None, converter=_optional_seconds, validator=_positive_seconds)

    def __attrs_post_init__(self) -> None:
        given = [name for name in ("steps", "epochs", "seconds") if getattr(self, name) is not None]
        if len(given) != 1:
            msg = f"KeepEvery got {' and '.join(given) or 'nothing'}; pass exactly one of steps, epochs, seconds"
            raise PolicyError(msg)

    def keep(self, history: Sequence[Record]) -> Mapping[str, str]:
        """See `Rule.keep`."""
        return Kept(self, ledger_of(history))

    def why(self, record: Record, history: Ledger) -> str | None:
        """See `Asked.why`."""
        if self.seconds is not None:
            is_kept = history.fold(_Spaced(self.seconds)).places.get(commit_order(record)) is not None
        else:
            is_kept = self._is_first(record, history)
        return str(self) if is_kept else None

    def kept(self, history: Ledger) -> Iterable[Record]:
        """See `Asked.kept`."""
        if self.seconds is not None:
            return history.fold(_Spaced(self.seconds)).places
        return [record for record in history if self._is_first(record, history)]

    def may_lose(self, before: Ledger, history: Ledger) -> Iterable[Record]:
        """See `Asked.may_lose`."""
        if self.seconds is not None:
            return _pushed_out(before.fold(_Spaced(self.seconds)), history.fold(_Spaced(self.seconds)), history)
        in_turn = history.by(self)
        keys = (self.sort_key(record) for record in history.change.come)
        return chain.from_iterable(islice(in_turn.starting_at(in_turn.rank(key) + 1), 1) for key in keys if key)

    def instead_of(self, record: Record, history: Ledger) -> Iterable[Record]:
        """See `Asked.instead_of`: the one that begins its interval."""
        if self.seconds is not None:
            places = history.fold(_Spaced(self.seconds)).places
            before = places.rank(commit_order(record)) - 1
            return [places[before]] if before >= 0 else []
        key = self.sort_key(record)
        in_turn = history.by(self)
        return islice(in_turn.starting_at(in_turn.rank(key[:1])), 1) if key else ()

    def sort_key(self, record: Record) -> Key | None:
        """Return the key that sorts by interval, and within it the first first."""
        interval = record.step // self.steps if self.steps else record.progress.epochs // (self.epochs or 1)
        return (interval, *commit_order(record)) if interval else None

    def _is_first(self, record: Record, history: Ledger) -> bool:
        key = self.sort_key(record)
        if key is None:
            return False
        in_turn = history.by(self)
        before = in_turn.rank(key) - 1
        earlier = self.sort_key(in_turn[before]) if before >= 0 else None
        return earlier is None or earlier[0] != key[0]

    def __str__(self) -> str:
        if self.seconds is not None:
            return f"one every {self.seconds:g} s"
        return f"one every {self.steps} steps" if self.steps else f"one every {self.epochs} epochs"


@attrs.frozen
class _Spaced:
    """Those that are so many seconds apart, each from the one before: in commit order."""

    seconds: float

    def begin(self) -> _Places:
        return _Places()

    def take(self, state: _Places, record: Record) -> _Places:
        places = state.places
        if places and 0 <= record.time - places[-1].time < self.seconds:
            return state
        return attrs.evolve(state, places=places.put(commit_order(record), record))

    def untake(self, state: _Places, record: Record, *, is_newest: bool) -> _Places | None:
        places = state.places.drop(commit_order(record))
        return attrs.evolve(state, places=places) if is_newest or places is state.places else None


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
        return Kept(self, ledger_of(history))

    def why(self, record: Record, history: Ledger) -> str | None:
        """See `Asked.why`."""
        return str(self)

    def kept(self, history: Ledger) -> Iterable[Record]:
        """See `Asked.kept`."""
        return history

    def may_lose(self, before: Ledger, history: Ledger) -> Iterable[Record]:
        """See `Asked.may_lose`."""
        return ()

    def instead_of(self, record: Record, history: Ledger) -> Iterable[Record]:
        """See `Asked.instead_of`."""
        return ()

    def __str__(self) -> str:
        return "everything"


@attrs.frozen(kw_only=True)
class Budget:
    """Limit the bytes kept: the worst-ranked go first, never the newest, the best or a pinned one.

    Ranked by the first `KeepBest` of the policy, unranked records behind the ranked and the oldest of them first;
    without a `KeepBest` the oldest go first. A save is decided before its size is known: it is taken to be as large
    as the one before, and the budget holds again at the next save.

    Args:
        bytes: Bytes of payloads, at least 1.

    Example:
        >>> from checkpointer import Budget
        >>> print(Budget(bytes=20 * 10**9))
        at most 20000000000 bytes
    """

    bytes: int = attrs.field(validator=whole_number(1))

    def drop(self, kept: Sequence[Record], ranking: Ranking | None) -> Mapping[str, str]:
        """See `Limit.drop`."""
        ledger = ledger_of(kept)
        excess = ledger.bytes - self.bytes
        dropped: dict[str, str] = {}
        if excess <= 0:
            return dropped
        best = [] if ranking is None else islice(ranked_by(ranking, ledger), 1)
        safe = {record.name for record in (*best, *ledger[-1:])}
        for record in ledger if ranking is None else reversed(ledger.by(ranking)):
            if excess <= 0:
                break
            if not record.pinned and record.name not in safe:
                dropped[record.name] = str(self)
                excess -= record.size
        return dropped

    def __str__(self) -> str:
        return f"at most {self.bytes} bytes"
