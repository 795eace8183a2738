"""The manifest: what a directory's records say, seen by one run. A pure fold; nothing else is believed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import attrs

from checkpointer.records import Line, Observation, Record

__all__ = ["Manifest"]


class _Sorted(tuple[Record, ...]):
    """Records that are in commit order already."""

    __slots__ = ()


def _order(record: Record) -> tuple[int, float, str]:
    return record.serial, record.time, record.token


def _by_serial(records: Iterable[Record]) -> tuple[Record, ...]:
    return records if isinstance(records, _Sorted) else _Sorted(sorted(records, key=_order))


@attrs.frozen(kw_only=True)
class Manifest:
    """All committed records of a directory, and which of them count for one run.

    A run that restores an older step *forks*: it gets a longer ``line``, one ``(fork, step)`` more. A record counts
    if its own line is where ours began and it lies at or before every step we forked at since. So which records are
    abandoned follows from the records themselves, whatever was retired or interrupted in between.
    """

    records: tuple[Record, ...] = attrs.field(default=(), converter=_by_serial)
    """Committed records of every run and label, in commit order."""
    run: str = ""
    """Id of the run that looks; its own records are the only ones it may retire."""
    label: str = ""
    """Label of the manager that looks."""
    line: Line = ()
    """Forks the run descends from."""
    foreign: frozenset[str] = frozenset()
    """Names of payloads that no committed record names: never touched, never reused."""
    seen: frozenset[str] = frozenset()
    """Names of metrics reported so far, saved or not."""
    elsewhere: tuple[Record, ...] = ()
    """Records that only a mirror holds: not here, but a fork and the next serial have to pass them."""
    resumed: str = ""
    """Name of the checkpoint that was asked for by name, step or rank and resumed from: it lives while the run does."""

    @cached_property
    def own(self) -> tuple[Record, ...]:
        """Records this run wrote under this label, in commit order."""
        return tuple(r for r in self.records if r.run == self.run and r.label == self.label)

    @cached_property
    def history(self) -> tuple[Record, ...]:
        """Own records that count: neither abandoned nor a rescue."""
        return tuple(record for record in self.live if record.kind == "regular")

    @cached_property
    def live(self) -> tuple[Record, ...]:
        """Own records on the current line, rescues included."""
        return tuple(record for record in self.own if self.counts(record))

    @cached_property
    def pinned(self) -> tuple[Record, ...]:
        """Those of the `history` that are never retired."""
        return tuple(record for record in self.history if record.pinned)

    @cached_property
    def rescues(self) -> tuple[Record, ...]:
        """Those of the `live` that are none of the `history`."""
        return tuple(record for record in self.live if record.kind == "rescue")

    @cached_property
    def abandoned(self) -> tuple[Record, ...]:
        """Own records beyond a step the run went back to: listed, never ranked, never deleted."""
        return tuple(record for record in self.own if not self.counts(record))

    @cached_property
    def by_name(self) -> dict[str, Record]:
        """Every record by its name."""
        return {record.name: record for record in self.records}

    @cached_property
    def taken(self) -> frozenset[str]:
        """Every name that is in use, by a record of any run or by a foreign file."""
        return self.foreign.union(self.by_name)

    @property
    def next_serial(self) -> int:
        """Serial of the next commit."""
        return 1 + max((record.serial for record in (*self.records[-1:], *self.elsewhere)), default=0)

    @property
    def everywhere(self) -> Manifest:
        """The manifest as if what is elsewhere were here."""
        return attrs.evolve(self, records=(*self.records, *self.elsewhere), elsewhere=())

    @property
    def newest(self) -> Record | None:
        """The newest own record that counts, rescues included."""
        return self.live[-1] if self.live else None

    def counts(self, record: Record) -> bool:
        """Return whether the record lies on the current line."""
        shared = len(record.line)
        return record.line == self.line[:shared] and all(record.step <= step for _, step in self.line[shared:])

    def live_among(self, names: Iterable[str]) -> tuple[Record, ...]:
        """Return the `live` records that have one of these names, in commit order."""
        named = (self.by_name[name] for name in names)
        return _by_serial(r for r in named if r.run == self.run and r.label == self.label and self.counts(r))

    def at_step(self, step: int) -> Record | None:
        """Return the newest regular record that counts and has this step."""
        return self._by_step.get(step)

    @cached_property
    def _by_step(self) -> dict[int, Record]:
        return {record.step: record for record in self.history}

    def draft(self, name: str, now: Observation, **known: Any) -> Record:
        """Return the record of a checkpoint that this run may commit next; size, digest and token come later."""
        fields = {
            **{field: getattr(now, field) for field in ("step", "epoch", "epoch_end", "metrics", "time")},
            **{field: getattr(self, field) for field in ("run", "label", "line")},
            "serial": self.next_serial,
            "size": 0,
            "digest": "",
            "format": "",
            "token": "",
        }
        return Record(name=name, **{**fields, **known})

    def with_record(self, record: Record) -> Manifest:
        """Return the manifest after ``record`` was committed, in place of any other of that name."""
        foreign = self.foreign - {record.name} if record.name in self.foreign else self.foreign
        if record.name in self.by_name or (self.records and _order(record) < _order(self.records[-1])):
            others = (other for other in self.records if other.name != record.name)
            return attrs.evolve(self, records=(*others, record), foreign=foreign)
        extended = attrs.evolve(self, records=_Sorted((*self.records, record)), foreign=foreign)
        self._hand_on(extended, record)
        return extended

    def _hand_on(self, extended: Manifest, record: Record) -> None:
        """Spare the manifest with one record more to work out anew what is known of all the others."""
        own, live, history, by_step = self.own, self.live, self.history, self._by_step
        pinned, rescues = self.pinned, self.rescues
        if record.run == self.run and record.label == self.label:
            own = (*own, record)
            if self.counts(record):
                live = (*live, record)
                if record.kind == "regular":
                    history, by_step = (*history, record), {**by_step, record.step: record}
                    pinned = (*pinned, record) if record.pinned else pinned
                else:
                    rescues = (*rescues, record)
        known: dict[str, Any] = {"own": own, "live": live, "history": history, "_by_step": by_step}
        known |= {"pinned": pinned, "rescues": rescues}
        for name, value in {**known, "by_name": {**self.by_name, record.name: record}}.items():
            object.__setattr__(extended, name, value)

    def without(self, *names: str) -> Manifest:
        """Return the manifest after these records were retired."""
        if not any(name in self.by_name for name in names):
            return self
        return attrs.evolve(self, records=_Sorted(r for r in self.records if r.name not in names))

    def seen_by(self, run: str, line: Line) -> Manifest:
        """Return the same records as another run, or another line of it, sees them."""
        return attrs.evolve(self, run=run, line=line)

    def resumed_at(self, record: Record) -> Manifest:
        """Return the manifest of a run that goes on from ``record``."""
        return self._resumed(record.run, record.line, record.step, lambda other: other.serial > record.serial)

    def resumed_from(self, run: str, line: Line, step: int) -> Manifest:
        """Return the manifest of a run that goes on from ``step`` of a line, whether or not a record is there."""
        return self._resumed(run, line, step, lambda other: other.step > step)

    def _resumed(self, run: str, line: Line, step: int, is_later: Callable[[Record], bool]) -> Manifest:
        """Go on in line if nothing lies beyond, else fork."""
        on_line = self.seen_by(run, line)
        own = on_line.everywhere.own
        if not any(is_later(other) for other in own if other.line[: len(line)] == line):
            return on_line
        fork = 1 + max((number for other in own for number, _ in other.line), default=0)
        return self.seen_by(run, (*line, (fork, step)))
