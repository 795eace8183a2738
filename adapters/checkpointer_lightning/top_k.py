"""Which checkpoints compete for the top k: not those that only ``last`` was due for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import attrs

from checkpointer import KeepBest, Policy, Record
from checkpointer.policy.retention import Rule

__all__ = ["ONLY_LAST", "competing", "with_competitors"]

ONLY_LAST: Final = "checkpointer/only_last"
"""Metric of a checkpoint that only ``last`` was due for, so that no rule looks at it."""


def competing(records: Iterable[Record]) -> tuple[Record, ...]:
    """Return the records that rules may look at."""
    return tuple(record for record in records if ONLY_LAST not in record.metrics)


class _Best(KeepBest):
    """Ranks the records that compete."""

    def eligible(self, records: Iterable[Record]) -> tuple[Record, ...]:
        return competing(super().eligible(records))


@attrs.frozen
class _Others:
    """Applies a rule to the records that compete."""

    rule: Rule

    def keep(self, history: Sequence[Record]) -> Mapping[str, str]:
        return self.rule.keep(competing(history))

    def __str__(self) -> str:
        return str(self.rule)


def with_competitors(policy: Policy) -> Policy:
    """Return the policy with rules that look only at the records that compete."""
    return attrs.evolve(policy, keep=[_limited(rule) for rule in policy.keep])


def _limited(rule: Any) -> Any:
    if not isinstance(rule, KeepBest):
        return _Others(rule)
    metric = rule.metric
    return _Best(rule.k, metric.key, mode=metric.mode, ties=metric.ties, after_step=rule.after_step)
