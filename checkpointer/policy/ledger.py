"""Records in commit order, as a value: what is found out about them is handed on to the value with one record more.

A save looks something up: the fifth best, the newest but two, who has a name. Looking through all records for it would
make a save slower with each checkpoint that is kept. So a ledger sorts its records once by whatever they are asked for
by, and hands all its orders on to its successor, which costs the logarithm of how many there are.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, Final, Protocol, TypeVar, cast, overload

import attrs

from checkpointer.policy.ordered import Key, Ordered
from checkpointer.records.record import Record

__all__ = ["BY_STEP", "Change", "Finding", "Fold", "Ledger", "Order", "commit_order", "ledger_of"]

S = TypeVar("S")

_FORGOTTEN_AFTER: Final = 8
"""What was not asked of so many ledgers in a row is not handed on to the next."""


class Order(Protocol):
    """What records are sorted by."""

    def sort_key(self, record: Record) -> Key | None:
        """Return the record's key, which no other has; None if it has no place in this order."""
        ...


class Fold(Protocol[S]):
    """What is found out by going through the records one by one, where no order tells. Equal ones find out the same."""

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


@attrs.frozen
class Change:
    """What makes a ledger another one."""

    newest: Record | None = None
    """The newest of the ledger before."""
    gone: tuple[Record, ...] = ()
    come: tuple[Record, ...] = ()


class Finding(Protocol[S]):
    """What can be found out about a ledger: how to work it out, and how to go on from it after a change.

    Hashable; of equal ones the one is taken for the other.
    """

    def of(self, ledger: Ledger) -> S:
        """Work it out, by going through all records."""
        ...

    def after(self, found: S, before: Ledger, successor: Ledger) -> S | None:
        """Return what it is of ``before`` with ``successor.change``; None if it has to be worked out anew."""
        ...


@attrs.frozen
class _Sorted:
    order: Order = attrs.field(eq=id)
    """This very one: what derives from a rule may be equal to another and sort otherwise, or not be hashable."""

    def of(self, ledger: Ledger) -> Ordered[Record]:
        keyed = ((self.order.sort_key(record), record) for record in ledger)
        return Ordered((key, record) for key, record in keyed if key is not None)

    def after(self, found: Ordered[Record], before: Ledger, successor: Ledger) -> Ordered[Record] | None:
        for record in successor.change.gone:
            key = self.order.sort_key(record)
            without = found if key is None else found.drop(key)
            if key is not None and without is found:
                return None  # The key is not what it was: a score that depends on more than the metrics.
            found = without
        for record in successor.change.come:
            key = self.order.sort_key(record)
            found = found if key is None else found.put(key, record)
        return found


@attrs.frozen
class _Folded:
    fold: Fold[Any]

    def of(self, ledger: Ledger) -> Any:
        state = self.fold.begin()
        for record in ledger:
            state = self.fold.take(state, record)
        return state

    def after(self, found: Any, before: Ledger, successor: Ledger) -> Any:
        change = successor.change
        newest = change.newest
        for record in change.gone:
            found = self.fold.untake(found, record, is_newest=record == newest and len(change.gone) == 1)
            if found is None:
                return None
        for record in change.come:
            if newest is not None and commit_order(record) < commit_order(newest):
                return None
            found, newest = self.fold.take(found, record), record
        return found


_ALL: Final = "all"
"""The part that is all of a ledger: one that refers to itself is not freed at once."""


@attrs.frozen
class _Part:
    holds: Callable[[Record], bool]

    def of(self, ledger: Ledger) -> Ledger | str:
        part = [record for record in ledger if self.holds(record)]
        return _ALL if len(part) == len(ledger) else Ledger(part)

    def after(self, found: Ledger | str, before: Ledger, successor: Ledger) -> Ledger | str:
        change = successor.change
        come = tuple(record for record in change.come if self.holds(record))
        if isinstance(found, Ledger):
            return found.changed(gone=change.gone, come=come)
        return _ALL if len(come) == len(change.come) else before.changed(gone=change.gone, come=come)


@attrs.define
class _Found:
    value: Any
    asked: list[int]
    """The generation that was last asked for it. All share it: of a ledger that comes to nothing it counts as well."""


class Ledger(Sequence[Record]):
    """Records in commit order, oldest first, and whatever else they were lately asked for.

    Example:
        >>> Ledger().changed(come=[])
        Ledger()
    """

    __slots__ = ("__weakref__", "_before", "_found", "_generation", "_tree", "bytes", "change")

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._begin(Ordered((commit_order(record), record) for record in records))
        self.bytes: int = sum(record.size for record in self._tree)
        """Size of all payloads together."""

    def _begin(self, tree: Ordered[Record]) -> None:
        self._tree = tree
        self._found: dict[Finding[Any], _Found] = {}
        self._generation = 0
        self._before: Callable[[], Ledger | None] = _nobody
        self.change = Change()
        """What made it out of the ledger before it."""

    # What is asked for

    def named(self, name: object) -> Record | None:
        """Return the record of this name, or None."""
        return self.by(_BY_NAME).get((name,)) if isinstance(name, str) else None

    def by(self, order: Order) -> Ordered[Record]:
        """Return the records in another order."""
        return self.find(_Sorted(order))

    def fold(self, fold: Fold[S]) -> S:
        """Return what going through all records finds out."""
        return cast(S, self.find(_Folded(fold)))

    def where(self, holds: Callable[[Record], bool]) -> Ledger:
        """Return the records of which something holds: a function, or a hashable value that can be called."""
        part = self.find(_Part(holds))
        return part if isinstance(part, Ledger) else self

    def find(self, what: Finding[S]) -> S:
        """Return what is found out by going through all records, or by going on from the ledger before."""
        before = self._before()
        if what not in self._found and before:
            # By the ledger before, if it still lives: this one may be what a decision only thinks of.
            with contextlib.suppress(Exception):  # What is wrong with a score may be mended in this one.
                self._take_over(what, before._work_out(what), before)
        found = self._work_out(what)
        found.asked[0] = max(found.asked[0], self._generation)
        return cast(S, found.value)

    def _work_out(self, what: Finding[Any]) -> _Found:
        if what not in self._found:
            self._found[what] = _Found(what.of(self), [self._generation])
        return self._found[what]

    # What is handed on

    def changed(self, *, gone: Iterable[Record] = (), come: Iterable[Record] = ()) -> Ledger:
        """Return the ledger without some of its records, and with others."""
        come = tuple(come)
        replaced = (self._tree.get(commit_order(record)) for record in come)
        old = {commit_order(record): record for record in chain(gone, filter(None, replaced)) if record in self}
        change = Change(self._tree[-1] if len(self) else None, tuple(old.values()), come)
        if not change.gone and not change.come:
            return self
        tree = self._tree
        for key in old:
            tree = tree.drop(key)
        for record in come:
            tree = tree.put(commit_order(record), record)
        successor: Ledger = Ledger.__new__(Ledger)
        successor._begin(tree)
        successor.bytes = self.bytes + sum(r.size for r in change.come) - sum(r.size for r in change.gone)
        successor._generation = self._generation + 1
        successor._before = weakref.ref(self)
        successor.change = change
        # A copy: another thread may be asking this one for more.
        for what, found in self._found.copy().items():
            if self._generation - found.asked[0] < _FORGOTTEN_AFTER:
                successor._take_over(what, found, self)
        return successor

    def follows(self, before: Ledger) -> bool:
        """Return whether `change` is what lies between that ledger and this one, or nothing does."""
        return self is before or self._before() is before

    def _take_over(self, what: Finding[Any], found: _Found, before: Ledger) -> None:
        """Take over what was found out about the ledger before, if that is possible."""
        if what in self._found:
            return
        with contextlib.suppress(Exception):  # A score that cannot be worked out says so when it is asked for.
            value = what.after(found.value, before, self)
            if value is not None:
                self._found[what] = _Found(value, found.asked)

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

    def __reduce__(self) -> Any:
        return Ledger, (tuple(self),)

    def __repr__(self) -> str:
        return f"Ledger({list(self) if len(self) else ''})"


def ledger_of(records: Iterable[Record]) -> Ledger:
    """Return the records as a ledger; one that is one already as it is."""
    return records if isinstance(records, Ledger) else Ledger(records)


def _nobody() -> None:
    return None
