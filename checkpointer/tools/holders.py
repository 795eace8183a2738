"""Which processes have held the runs of a directory, and which one holds each now."""

from __future__ import annotations

from typing import Literal

import attrs

from checkpointer.commit.terms import TERMS, Claim, TermFiles, key_of, read_claim
from checkpointer.tools.catalog import Catalog

State = Literal["holds", "released", "ended", "replaced"]


@attrs.frozen(kw_only=True)
class HeldTerm:
    """One term of a run."""

    run: str
    label: str
    term: int
    claim: Claim
    state: State
    """``"holds"``: it may train now. ``"ended"``: its process has certainly ended, and did not close its manager."""
    limit: int | None
    """Records of lower terms count up to this serial; None if there were none."""


def terms_of(catalog: Catalog, run: str, label: str) -> tuple[HeldTerm, ...]:
    """Return the terms of a run, the first one first. Reads one small file for each.

    Example:
        >>> from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy
        >>> from checkpointer.testing import MemoryStorage
        >>> from checkpointer.tools.catalog import look_at
        >>> storage = MemoryStorage()
        >>> with CheckpointManager(storage, Policy(EverySteps(1), [KeepLast(1)]), state=dict) as manager:
        ...     decision = manager.observe({}, step=1, epoch=0)
        >>> catalog = look_at(storage)
        >>> [(one.term, one.state) for one in terms_of(catalog, *catalog.runs[0])]
        [(1, 'released')]
    """
    key = key_of(run, label)
    found, limits = TermFiles.of(catalog.terms.get(key, ()), key), dict(catalog.limits.get((run, label), ()))
    terms = []
    for number in reversed(found.claimed):
        claim = read_claim(catalog.storage, f"{TERMS}/{key}", number, catalog.trust)
        state: State = "holds"
        if number in found.ended:
            state = "released"
        elif claim.has_ended:
            state = "ended"
        elif number < found.highest:
            state = "replaced"
        terms.append(HeldTerm(run=run, label=label, term=number, claim=claim, state=state, limit=limits.get(number)))
    return tuple(terms)


def holders(catalog: Catalog) -> tuple[HeldTerm, ...]:
    """Return for each run that a process may be training now the term of that process."""
    found = []
    for run, label in catalog.runs:
        key = key_of(run, label)
        terms = TermFiles.of(catalog.terms.get(key, ()), key)
        if terms.claimed and terms.claimed[0] not in terms.ended:
            found += [one for one in terms_of(catalog, run, label)[-1:] if one.state == "holds"]
    return tuple(found)
