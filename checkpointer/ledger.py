"""Records in commit order, as a value: what is found out about them is handed on to the value with one record more.

A save looks something up: the fifth best, the newest but two, who has a name. Looking through all records for it would
make a save slower with each checkpoint that is kept. So a ledger sorts its records once by whatever they are asked for
by, and hands all its orders on to its successor, which costs the logarithm of how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol, TypeVar, cast, overload

import attrs

from checkpointer.ordered import Key, Ordered
from checkpointer.records import Record

__all__ = ["BY_STEP", "Fold", "Ledger", "Order", "commit_order", "ledger_of"]

S = TypeVar("S")

_MOST_JOINED = 64
"""After so many records that came without being asked about, all are looked at again."""


class Order(Protocol):
    """What records are sorted by. Two that are equal sort alike; hashable."""

    def sort_key(self, record: Record) -> Key | None:
        """Return the record's key, which no other has; None if it has no place in this order."""
        ...


class Fold(Protocol[S]):
    """What is found out by going through the records one by one, where no order tells. Hashable."""

    def begin(self) -> S:
        """Return what is known of no records."""
        ...

    def take(self, state: S, record: Record) -> S:
        """Return what is known after the next record."""
        ...

    def untake(self, state: S, record: Record, *, is_newest: bool) -> S | None:
        """Return what would be known had the record not been there; None if only going through all tells."""
        ...


def commit_order(record: Record) -> Key:
    """Return the key of the order in which checkpoints were committed."""
    return record.serial, record.time, record.token, record.name


@attrs.frozen
class _ByName:
    def sort_key(self, record: Record) -> Key:
        return (record.name,)


@attrs.frozen
class _ByStep:
    def sort_key(self, record: Record) -> Key:
        return record.step, *commit_order(record)


_BY_NAME = _ByName()
BY_STEP = _ByStep()
"""By step, of one step the newest last."""


class Ledger(Sequence[Record]):
    """Records in commit order, oldest first, and whatever else they were ever asked for by.

    Example:
        >>> Ledger().changed(come=[])
        Ledger()
    """

    __slots__ = ("_folds", "_orders", "_parts", "_settled", "_tree", "bytes")

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._tree: Ordered[Record] = Ordered((commit_order(record), record) for record in records)
        self.bytes: int = sum(record.size for record in self._tree)
        """Size of all payloads together."""
        self._begin()

    def _begin(self) -> None:
        self._orders: dict[Order, Ordered[Record]] = {}
        self._folds: dict[Fold[Any], Any] = {}
        self._parts: dict[Callable[[Record], bool], Ledger | None] = {}
        # None: it holds of all of them. Not a reference to itself, which only the collector of cycles would free.
        self._settled: tuple[object, frozenset[str], tuple[Record, ...]] | None = None

    # What is asked for

    def named(self, name: str) -> Record | None:
        """Return the record of this name, or None."""
        return self.by(_BY_NAME).get((name,))

    def by(self, order: Order) -> Ordered[Record]:
        """Return the records in another order."""
        if order not in self._orders:
            keyed = ((order.sort_key(record), record) for record in self._tree)
            self._orders[order] = Ordered((key, record) for key, record in keyed if key is not None)
        return self._orders[order]

    def fold(self, fold: Fold[S]) -> S:
        """Return what going through all records finds out."""
        if fold not in self._folds:
            state = fold.begin()
            for record in self._tree:
                state = fold.take(state, record)
            self._folds[fold] = state
        return cast(S, self._folds[fold])

    def where(self, holds: Callable[[Record], bool]) -> Ledger:
        """Return the records of which something holds: a function, or a hashable value that can be called."""
        if holds not in self._parts:
            found = [record for record in self._tree if holds(record)]
            self._parts[holds] = None if len(found) == len(self) else Ledger(found)
        part = self._parts[holds]
        return self if part is None else part

    # What is handed on

    def changed(self, *, gone: Iterable[Record] = (), come: Iterable[Record] = ()) -> Ledger:
        """Return the ledger without some of its records, and with others."""
        gone = tuple(record for record in gone if record in self)
        come = tuple(come)
        if not gone and not come:
            return self
        successor: Ledger = Ledger.__new__(Ledger)
        successor._begin()
        successor.bytes = self.bytes - sum(record.size for record in gone) + sum(record.size for record in come)
        successor._tree = _handed_on(self._tree, commit_order, gone, come)
        # Of copies: another thread may be asking this one for more.
        for order, tree in self._orders.copy().items():
            try:
                successor._orders[order] = _handed_on(tree, order.sort_key, gone, come)
            except Exception:  # A score that cannot be worked out says so when it is asked for.
                continue
        newest = self._tree[-1] if len(self) else None
        for fold, state in self._folds.copy().items():
            state = _folded_on(fold, state, newest, gone, come)
            if state is not None:
                successor._folds[fold] = state
        for holds, part in self._parts.copy().items():
            fitting = tuple(record for record in come if holds(record))
            if part is not None or len(fitting) < len(come):
                successor._parts[holds] = (self if part is None else part).changed(gone=gone, come=fitting)
            else:
                successor._parts[holds] = None
        successor._settled = self._settled_on(successor, come)
        return successor

    # What was found out for a whole set of rules

    def settled(self, what: object) -> tuple[frozenset[str], tuple[Record, ...]] | None:
        """Return the names that `settle` was told of an earlier ledger, and the records that came or changed since.

        None if it was told of something else, or something changed that makes all of it doubtful. Some of the records
        may be gone by now.
        """
        settled = self._settled
        return None if settled is None or settled[0] != what else settled[1:]

    def settle(self, what: object, names: frozenset[str]) -> None:
        """Remember which names something was found out of."""
        self._settled = (what, names, ())

    def _settled_on(self, successor: Ledger, come: tuple[Record, ...]) -> Any:
        settled = self._settled
        if settled is None or self._has_lost_a_fold(successor):
            return None
        what, names, joined = settled
        joined = (*joined, *come)
        return (what, names, joined) if len(joined) <= _MOST_JOINED else None

    def _has_lost_a_fold(self, successor: Ledger) -> bool:
        if self._folds.keys() - successor._folds.keys():
            return True
        # What holds of all was found out by this ledger itself.
        parts = [(part, successor._parts.get(holds)) for holds, part in self._parts.copy().items() if part is not None]
        return any(after is None or before._has_lost_a_fold(after) for before, after in parts)

    # A sequence

    def __len__(self) -> int:
        return len(self._tree)

    @overload
    def __getitem__(self, place: int) -> Record: ...

    @overload
    def __getitem__(self, place: slice) -> tuple[Record, ...]: ...

    def __getitem__(self, place: int | slice) -> Record | tuple[Record, ...]:
        if isinstance(place, int):
            return self._tree[place]
        start, stop, step = place.indices(len(self))
        if step != 1:
            return tuple(self._tree)[place]
        return tuple(islice(self._tree.starting_at(start), max(stop - start, 0)))

    def __iter__(self) -> Iterator[Record]:
        return iter(self._tree)

    def __reversed__(self) -> Iterator[Record]:
        return reversed(self._tree)

    def __contains__(self, record: object) -> bool:
        return isinstance(record, Record) and self._tree.get(commit_order(record)) == record

    def __eq__(self, other: object) -> bool:
        if isinstance(other, (Ledger, tuple)):
            return tuple(self) == tuple(other)
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]  # As its records: metrics are mappings.

    def __repr__(self) -> str:
        return f"Ledger({list(self) if len(self) else ''})"


def ledger_of(records: Iterable[Record]) -> Ledger:
    """Return the records as a ledger; one that is one already as it is."""
    return records if isinstance(records, Ledger) else Ledger(records)


def _handed_on(
    tree: Ordered[Record],
    sort_key: Callable[[Record], Key | None],
    gone: Iterable[Record],
    come: Iterable[Record],
) -> Ordered[Record]:
    for record in gone:
        key = sort_key(record)
        tree = tree if key is None else tree.drop(key)
    for record in come:
        key = sort_key(record)
        tree = tree if key is None else tree.put(key, record)
    return tree


def _folded_on(
    fold: Fold[Any], state: Any, newest: Record | None, gone: tuple[Record, ...], come: tuple[Record, ...]
) -> Any:
    """Return what a fold knows of the successor, or None."""
    for record in gone:
        state = fold.untake(state, record, is_newest=record == newest and len(gone) == 1)
        if state is None:
            return None
    for record in come:
        if newest is not None and commit_order(record) < commit_order(newest):
            return None
        state, newest = fold.take(state, record), record
    return state
