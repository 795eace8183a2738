"""The settings of a mirror, and the plan that brings it up to date: a pure function of the records on both sides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import attrs

from checkpointer._secrets import without_secrets
from checkpointer.policy.decide import explain
from checkpointer.policy.policy import Policy
from checkpointer.policy.retention import Limit, Rule
from checkpointer.records.manifest import Manifest
from checkpointer.records.record import Record, commit_order
from checkpointer.storage.opening import Where

RETRY_S: Final = (1.0, 60.0)
"""Minimum and maximum seconds between two tries."""


def _as_rules(keep: Iterable[Rule | Limit] | None) -> tuple[Rule | Limit, ...] | None:
    return None if keep is None else tuple(keep)


def _shown(where: Where) -> str:
    return repr(without_secrets(where) if isinstance(where, str) else where)


@attrs.frozen
class Mirror:
    """A second place for checkpoints: ``CheckpointManager(..., mirror=Mirror("s3://bucket/run"))``.

    Args:
        where: A path, an fsspec URL, or a storage.
        keep: Rules and limits for the mirror; None takes those of the policy.
        options: What fsspec needs besides the URL, such as credentials; never logged or stored.

    Example:
        >>> from checkpointer import KeepLast, Mirror
        >>> Mirror("s3://bucket/run", keep=[KeepLast(3)])
        Mirror(where='s3://bucket/run', keep=(KeepLast(n=3),))
    """

    where: Where = attrs.field(repr=_shown)
    keep: tuple[Rule | Limit, ...] | None = attrs.field(default=None, kw_only=True, converter=_as_rules)
    options: Mapping[str, Any] | None = attrs.field(default=None, kw_only=True, repr=False)


@attrs.frozen(kw_only=True)
class MirrorStatus:
    """How far the copies are."""

    behind: tuple[str, ...] = ()
    """Checkpoints that its rules keep and that it is not known to have, newest first."""
    error: str = ""
    """The error of the last try; empty if it succeeded."""


@attrs.frozen(kw_only=True)
class Plan:
    """The changes that bring a mirror up to date."""

    missing: tuple[Record, ...] = ()
    """Records of the directory, newest first, that the mirror's rules keep and that the mirror does not have."""
    changed: tuple[Record, ...] = ()
    """Records of the mirror with metrics and pins that were added here later."""
    kept: frozenset[str] = frozenset()
    """Names on the mirror that its rules keep, once nothing is missing."""


def plan(policy: Policy, here: Manifest, there: Manifest, skip: frozenset[tuple[str, str]] = frozenset()) -> Plan:
    """Compare two manifests, both from the view of the first one's run; ``skip`` has tokens and names to leave out."""
    copies = {record.token: record for record in there.seen_by(here.run, here.line).own}
    changed = {}
    for record in here.own:
        copy = copies.get(record.token)
        if copy is not None and (wanted := attrs.evolve(record, name=copy.name, term=copy.term)) != copy:
            changed[copy.name] = wanted
    # Under names that no file can have, because their names on the mirror are not known yet.
    absent = {f"\0{r.token}": r for r in here.live if r.token not in copies and (r.token, r.name) not in skip}
    resumed = here.by_name[here.resumed].token if here.resumed in here.by_name else ""
    would_be = attrs.evolve(
        there,
        records=(
            *(changed.get(record.name, record) for record in there.records),
            *(attrs.evolve(record, name=name, term=there.highest_term) for name, record in absent.items()),
        ),
        run=here.run,
        line=here.line,
        resumed=copies[resumed].name if resumed in copies else f"\0{resumed}",
    )
    kept = explain(policy, would_be)
    missing = sorted((r for name, r in absent.items() if name in kept), key=commit_order, reverse=True)
    return Plan(missing=tuple(missing), changed=tuple(changed.values()), kept=frozenset(kept))


def lost(policy: Policy, here: Manifest, there: Manifest, announced: Iterable[Record]) -> tuple[Record, ...]:
    """Return the announced records that the mirror would keep, but that are gone here before it had them."""
    have = {record.token for record in (*here.own, *there.records)}
    gone = {record.token: record for record in announced if record.token not in have}
    wide = attrs.evolve(here, records=(*here.records, *gone.values()))
    return tuple(record for record in plan(policy, wide, there).missing if record.token in gone)


def retry_after(failures: int, dice: float) -> float:
    """Return seconds to wait after so many failures in a row; ``dice`` in [0, 1) spreads writers that fail together."""
    least, most = RETRY_S
    return min(most, least * 2.0 ** min(failures - 1, 30)) * (1 + dice) / 2
