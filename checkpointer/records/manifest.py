"""The manifest: what a directory's records say, seen by one run. A pure fold; nothing else is believed."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Container, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

import attrs

from checkpointer.records.record import Line, Observation, Ordered, Progress, Record, commit_order, in_commit_order

Limits = Mapping[tuple[str, str], tuple[tuple[int, int], ...]]
"""By run and label ``(term, serial)``: the records of lower terms count up to this serial."""


def _num_adopted(records: Sequence[Record]) -> int:
    """Return how many of these are adopted; they come first in commit order."""
    return bisect_left(records, True, key=lambda record: not record.is_adopted)


@attrs.frozen(kw_only=True)
class Manifest:
    """All committed records of a directory, and which of them count for one run.

    A run that restores an older step *forks*: it gets a longer ``line``, one ``(fork, step)`` more. A record counts
    if its own line is where ours began and it lies at or before every step we forked at since. So which records are
    abandoned follows from the records themselves, whatever was retired or interrupted in between.
    """

    records: tuple[Record, ...] = attrs.field(default=(), converter=in_commit_order)
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
    aside: tuple[Record, ...] = attrs.field(default=(), converter=in_commit_order)
    """Records that do not count, because their payload is gone or is not what was written. Their names stay taken."""
    elsewhere: tuple[Record, ...] = ()
    """Records that only a mirror holds. Like those `aside`, they do not count, but forks and serials pass them."""
    term: int = 0
    """The term of the run that this process holds; 0 if it holds none."""
    limits: Limits = MappingProxyType({})
    """Which records count after another process took over a run."""
    resumed: str = ""
    """Name of the checkpoint that was asked for and resumed from: it is kept while the run goes on."""

    @cached_property
    def own(self) -> tuple[Record, ...]:
        """Records this run wrote under this label, in commit order."""
        return Ordered([r for r in self.records if r.run == self.run and r.label == self.label])

    @cached_property
    def live(self) -> tuple[Record, ...]:
        """Own records on the current line, rescues included."""
        line, limits = self.line, self.limits.get((self.run, self.label), ())
        term = max((term for term, _ in limits), default=0)
        serial = min((serial for _, serial in limits), default=0)
        # `counts` is not called for most of many records: they are on the line, and new enough or old enough.
        return Ordered(
            [r for r in self.own if (r.line == line and (r.term >= term or r.serial <= serial)) or self.counts(r)]
        )

    @cached_property
    def history(self) -> tuple[Record, ...]:
        """Own records that count: neither abandoned nor a rescue."""
        return Ordered([record for record in self.live if record.kind == "regular"])

    @property
    def abandoned(self) -> tuple[Record, ...]:
        """Own records that do not count (see `why_abandoned`): listed, never ranked, never deleted."""
        return tuple(record for record in self.own if not self.counts(record))

    @cached_property
    def by_name(self) -> dict[str, Record]:
        """Every record by its name."""
        return {record.name: record for record in self.records}

    @cached_property
    def _by_step(self) -> dict[int, Record]:
        count = _num_adopted(self.history)
        # An adopted checkpoint of a step that the run reaches later holds another state.
        first = min((record.step for record in self.history[count : count + 1]), default=math.inf)
        own = {record.step: record for record in self.history[count:]}
        return {record.step: record for record in self.history[:count] if record.step <= first} | own

    @property
    def taken(self) -> frozenset[str]:
        """Every name that is in use, by a record of any run, counting or not, or by a foreign file."""
        return self.foreign.union(self.by_name, (record.name for record in self.aside))

    def lost(self, name: str) -> Record | None:
        """Return the record of this name whose payload is gone, and nothing else is there; None if there is none."""
        return None if name in self.foreign else next((r for r in self.aside if r.name == name), None)

    def is_taken(self, name: str) -> bool:
        """Return whether a name is among the `taken`, without a set of them all."""
        return name in self.by_name or name in self.foreign or self.lost(name) is not None

    @property
    def next_serial(self) -> int:
        """Serial of the next commit."""
        count = _num_adopted(self.records)
        known = (*self.records[max(count - 1, 0) : count], *self.records[-1:], *self.aside, *self.elsewhere)
        return 1 + max((record.serial for record in known), default=0)

    @property
    def everywhere(self) -> Manifest:
        """The manifest as if what is elsewhere or aside were here."""
        if not self.aside and not self.elsewhere:
            return self
        return attrs.evolve(self, records=(*self.records, *self.aside, *self.elsewhere), elsewhere=())

    @property
    def newest(self) -> Record | None:
        """The newest own record that counts, rescues included."""
        return self.live[-1] if self.live else None

    def progress_at(self, record: Record | None) -> Progress:
        """Return how far the run was at a record, with what its records up to there have reported; zeros for None."""
        if record is None:
            return Progress()
        return record.progress.after(one.progress for one in self.history if one.step <= record.step)

    def counts(self, record: Record) -> bool:
        """Return whether the record lies on the current line."""
        shared = len(record.line)
        is_on_line = record.line == self.line[:shared] and all(record.step <= step for _, step in self.line[shared:])
        return is_on_line and self.is_of_holder(record)

    def is_of_holder(self, record: Record) -> bool:
        """Return whether the record was committed before another process took over its run."""
        limits = self.limits.get((record.run, record.label), ()) if self.limits else ()
        return record.is_adopted or all(record.term >= term or record.serial <= serial for term, serial in limits)

    def why_abandoned(self, record: Record) -> str:
        """Return why a record of the run does not count; empty if it counts."""
        if not self.is_of_holder(record):
            return "abandoned: another process had taken over the run"
        return "" if self.counts(record) else "abandoned: the run went back to an earlier step"

    @property
    def highest_term(self) -> int:
        """The highest term of the run that is known."""
        return max([self.term, *(term for term, _ in self.limits.get((self.run, self.label), ()))])

    @property
    def newest_own(self) -> Record | None:
        """The newest own record of any line, without those of a process that was replaced; None if there is none."""
        return next((record for record in reversed(self.own) if self.is_of_holder(record)), None)

    @property
    def newest_line(self) -> Line:
        """The line of that record; empty if there is none."""
        return self.newest_own.line if self.newest_own is not None else ()

    def at_step(self, step: int) -> Record | None:
        """Return the newest regular record that counts and has this step."""
        return self._by_step.get(step)

    def draft(self, name: str, now: Observation, **known: Any) -> Record:
        """Return the record of a checkpoint that this run may commit next; size, digest and token come later."""
        fields: dict[str, Any] = {"serial": self.next_serial, "size": 0, "digest": "", "format": "", "token": ""}
        fields |= {field: getattr(now, field) for field in ("step", "epoch", "epoch_end", "metrics", "time")}
        fields |= {field: getattr(self, field) for field in ("run", "label", "line", "term")}
        return Record(name=name, **(fields | known))

    def with_record(self, record: Record) -> Manifest:
        """Return the manifest after ``record`` was committed, in place of any other of that name."""
        others = self.without(record.name)
        is_newest = not others.records or commit_order(others.records[-1]) < commit_order(record)
        records = (*others.records, record)
        foreign = self.foreign - {record.name} if record.name in self.foreign else self.foreign
        manifest = attrs.evolve(others, records=Ordered(records) if is_newest else records, foreign=foreign)
        if is_newest:
            manifest._extend(others, record)
        return manifest

    def _extend(self, others: Manifest, newest: Record) -> None:
        """Add the newest record to what is known of the others: a pass through many records takes long."""
        is_own = (newest.run, newest.label) == (self.run, self.label)
        is_live = is_own and self.counts(newest)
        object.__setattr__(self, "by_name", others.by_name | {newest.name: newest})
        for name, takes in (("own", is_own), ("live", is_live), ("history", is_live and newest.kind == "regular")):
            known = getattr(others, name)
            object.__setattr__(self, name, Ordered((*known, newest)) if takes else known)

    def without(self, *names: str) -> Manifest:
        """Return the manifest after these records were retired."""
        if self.by_name.keys().isdisjoint(names) and not any(record.name in names for record in self.aside):
            return self
        records = Ordered([record for record in self.records if record.name not in names])
        aside = Ordered([record for record in self.aside if record.name not in names])
        return attrs.evolve(self, records=records, aside=aside)

    def without_payload(self, *records: Record, there: Container[str] = ()) -> Manifest:
        """Return the manifest after these records turned out not to count; ``there``: names that a file has."""
        names = [record.name for record in records]
        manifest = self.without(*names)
        foreign = manifest.foreign.union(name for name in names if name in there)
        return attrs.evolve(manifest, aside=(*manifest.aside, *records), foreign=foreign)

    def seen_by(self, run: str, line: Line) -> Manifest:
        """Return the same records as another run, or another line of it, sees them."""
        return attrs.evolve(self, run=run, line=line)

    def on_newest_line(self, run: str) -> Manifest:
        """Return the same records as a run sees them that goes on where its newest record is, even if that is aside."""
        return self.seen_by(run, self.seen_by(run, ()).everywhere.newest_line)

    def resumed_at(self, record: Record) -> Manifest:
        """Return the manifest of a run that goes on from ``record``."""
        return self._resumed(
            record.run, record.line, record.step, lambda other: commit_order(other) > commit_order(record)
        )

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
