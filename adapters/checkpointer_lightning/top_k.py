"""Which checkpoints compete for the top k: not those that only ``last`` was due for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, cast

import attrs

from checkpointer import KeepBest, Policy, Record
from checkpointer.policy.ledger import Ledger, ledger_of
from checkpointer.policy.retention import Asked, Kept, Rule

__all__ = ["ONLY_LAST", "competing", "with_competitors"]

ONLY_LAST: Final = "checkpointer/only_last"
"""Metric of a checkpoint that no rule but ``last`` was asked about."""


def competes(record: Record) -> bool:
    """Return whether rules may look at the record."""
    return ONLY_LAST not in record.metrics


def competing(records: Iterable[Record]) -> Ledger:
    """Return the records that rules may look at."""
    return ledger_of(records).where(competes)


class _Best(KeepBest):
    """Ranks what competes."""

    def ranks(self, record: Record) -> bool:
        return competes(record) and super().ranks(record)


@attrs.frozen
class _Others:
    """Keeps of what competes what its rule keeps."""

    rule: Rule

    def keep(self, history: Sequence[Record]) -> Mapping[str, str]:
        ledger = ledger_of(history)
        rivals = competing(ledger)
        kept = self.rule.keep(rivals)
        return Kept(self, ledger) if isinstance(kept, Kept) and kept.is_of(self.rule, rivals) else kept

    def why(self, record: Record, history: Ledger) -> str | None:
        return self._asked.why(record, competing(history)) if competes(record) else None

    def kept(self, history: Ledger) -> Iterable[Record]:
        return self._asked.kept(competing(history))

    def may_lose(self, before: Ledger, history: Ledger) -> Iterable[Record]:
        rivals = competing(history)
        then = competing(before)
        return self._asked.may_lose(then, rivals) if rivals.follows(then) else rivals

    def instead_of(self, record: Record, history: Ledger) -> Iterable[Record]:
        return self._asked.instead_of(record, competing(history))

    @property
    def _asked(self) -> Asked:
        return cast(Asked, self.rule)

    def __str__(self) -> str:
        return str(self.rule)


def with_competitors(policy: Policy) -> Policy:
    """Return the policy with rules that look only at what competes."""
    return attrs.evolve(policy, keep=[_limited(rule) for rule in policy.keep])


def _limited(rule: Any) -> Any:
    if not isinstance(rule, KeepBest):
        return _Others(rule)
    metric = rule.metric
    return _Best(rule.k, metric.key, mode=metric.mode, ties=metric.ties, after_step=rule.after_step)
