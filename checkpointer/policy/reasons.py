"""Why checkpoints live: the union of what the rules keep, as far as the limits let it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Final, TypeGuard

import attrs

from checkpointer.policy.ledger import Ledger, ledger_of
from checkpointer.policy.ranking import Ranking
from checkpointer.policy.retention import Kept, Limit, Rule
from checkpointer.records.record import Record

__all__ = ["PINNED", "Reasons", "kept_by"]


@attrs.frozen
class Reasons:
    """Why checkpoints live: asked by rule and not by checkpoint, for of many thousands hardly one is of interest."""

    by_rule: tuple[Mapping[str, str], ...]
    """What each rule keeps, by name."""
    unkept: frozenset[str] = frozenset()
    """Names in the history that no rule keeps."""
    dropped: frozenset[str] = frozenset()
    """Names that a limit takes away from the rules."""
    always: tuple[Mapping[str, str], ...] = ()
    """What lives whatever a limit says."""

    def of(self, name: str) -> tuple[str, ...]:
        """Return every reason for one of them; empty if there is none."""
        rules = () if name in self.dropped else self.by_rule
        return tuple(why for kept in (*rules, *self.always) if (why := kept.get(name)) is not None)

    def to_dict(self) -> dict[str, tuple[str, ...]]:
        """Return the reasons of each that has one."""
        names = dict.fromkeys(name for kept in (*self.by_rule, *self.always) for name in kept)
        return {name: why for name in names if (why := self.of(name))}


@attrs.frozen
class _Pinned:
    """Keeps what a person pinned."""

    def keep(self, history: Sequence[Record]) -> Mapping[str, str]:
        return Kept(self, ledger_of(history))

    def why(self, record: Record, history: Ledger) -> str | None:
        return "pinned" if record.pinned else None

    def kept(self, history: Ledger) -> Iterable[Record]:
        return [record for record in history if record.pinned]

    def may_lose(self, before: Ledger, history: Ledger) -> Iterable[Record]:
        return ()

    def instead_of(self, record: Record, history: Ledger) -> Iterable[Record]:
        return ()


PINNED: Final = _Pinned()
"""The rule that holds whatever the policy says."""


def kept_by(
    rules: Sequence[Rule],
    limits: Sequence[Limit],
    history: Sequence[Record],
    ranking: Ranking | None,
    *,
    named: Sequence[Mapping[str, str]] = (),
) -> Reasons:
    """Return what lives by the rules, as far as the limits let it; ``named`` lives as if a rule kept it."""
    ledger = ledger_of(history)
    kept = tuple(rule.keep(ledger) for rule in rules)
    unkept = ledger.find(_Unkept(tuple(rules))) if _are_own(kept, rules, ledger) else _in_none(ledger, kept)
    unkept = frozenset(name for name in unkept if not any(name in names for names in named))
    reasons = Reasons((*kept, *named), unkept)
    if not limits:
        return reasons
    if ranking is not None:
        ledger.by(ranking)  # Here, where it is handed on, and not of what is left, which nobody remembers.
    left = _without(ledger, unkept)
    for limit in limits:
        # Whatever a limit says: a pinned checkpoint is never retired.
        going = [(name, left.named(name)) for name in limit.drop(left, ranking)]
        gone = frozenset(name for name, record in going if record is not None and not record.pinned)
        reasons = attrs.evolve(reasons, dropped=reasons.dropped | gone)
        left = _without(left, gone)
    return reasons


def _without(history: Ledger, names: Iterable[str]) -> Ledger:
    return history.changed(gone=[record for name in names if (record := history.named(name)) is not None])


def _in_none(records: Iterable[Record], kept: Sequence[Mapping[str, str]]) -> frozenset[str]:
    return frozenset(record.name for record in records if not any(record.name in names for names in kept))


def _are_own(kept: Sequence[Mapping[str, str]], rules: Sequence[Rule], history: Ledger) -> TypeGuard[Sequence[Kept]]:
    """Return whether each rule answers for itself.

    What it has from another rule, or of other records, it may have from yet others the next time.
    """
    pairs = zip(rules, kept, strict=True)
    return all(isinstance(names, Kept) and names.is_of(rule, history) for rule, names in pairs)


@attrs.frozen
class _Unkept:
    """The names that no rule keeps: who was kept still is, unless somebody who came has pushed it out."""

    rules: tuple[Rule, ...] = attrs.field(eq=lambda rules: tuple(map(id, rules)))

    def of(self, ledger: Ledger) -> frozenset[str]:
        return _in_none(ledger, [rule.keep(ledger) for rule in self.rules])

    def after(self, found: frozenset[str], before: Ledger, successor: Ledger) -> frozenset[str] | None:
        kept = [rule.keep(successor) for rule in self.rules]
        if not _are_own(kept, self.rules, successor):
            return None
        pushed_out = chain.from_iterable(names.rule.may_lose(before, successor) for names in kept)
        doubtful = found.union(record.name for record in chain(successor.change.come, pushed_out))
        return _in_none(filter(None, map(successor.named, doubtful)), kept)
