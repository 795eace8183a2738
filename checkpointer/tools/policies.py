"""The policies of the runs of a directory: the one that a command was given, else the one that the run has noted.

A noted policy is advice for commands. It is never used if a command is given a policy, and no manager reads it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import attrs

from checkpointer.commit.terms import TERMS, TermFiles, key_of, read_claim
from checkpointer.errors import PolicyError
from checkpointer.policy.policy import Policy
from checkpointer.tools.catalog import Catalog

_MOST_CLAIMS = 50
"""So many claims of a run are read at most. Commands that change a run claim it too, and have no policy."""


@attrs.define
class Policies:
    """The policy of each run of a directory.

    Args:
        catalog: The directory.
        given: The policy that a command was given, for all runs; None if there is none.

    Example:
        >>> from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy
        >>> from checkpointer.testing import MemoryStorage
        >>> from checkpointer.tools.catalog import look_at
        >>> storage = MemoryStorage()
        >>> with CheckpointManager(storage, Policy(EverySteps(1), [KeepLast(2)]), state=dict) as manager:
        ...     decision = manager.observe({}, step=1, epoch=0)
        >>> catalog = look_at(storage)
        >>> print(Policies(catalog).of(*catalog.runs[0]))
        save every step; keep the last 2
    """

    catalog: Catalog
    given: Policy | None = None
    _noted: dict[tuple[str, str], Policy | None] = attrs.field(factory=dict, init=False)

    def of(self, run: str, label: str) -> Policy | None:
        """Return the policy of a run and label, or None if it is not known."""
        if self.given is not None:
            return self.given
        if (run, label) not in self._noted:
            text = noted_text(self.catalog, run, label)
            self._noted[run, label] = None
            # It may name rules of the user's own, or be of a newer version. A text of one line would be a path.
            with contextlib.suppress(PolicyError):
                self._noted[run, label] = Policy.from_yaml(f"{text}\n") if text else None
        return self._noted[run, label]

    def metrics(self, runs: Iterable[tuple[str, str]]) -> list[str]:
        """Return the names of the metrics that the policies of these runs rank by."""
        found = [policy for run in dict.fromkeys(runs) if (policy := self.of(*run)) is not None]
        return sorted(frozenset().union(*(policy.known_metrics for policy in found)))


def noted_text(catalog: Catalog, run: str, label: str) -> str:
    """Return the newest policy that a run has noted, as YAML; empty if there is none.

    In a signed directory a policy that is not signed does not count.
    """
    key = key_of(run, label)
    for number in TermFiles.of(catalog.terms.get(key, ()), key).claimed[:_MOST_CLAIMS]:
        claim = read_claim(catalog.storage, f"{TERMS}/{key}", number, catalog.trust)
        if claim.policy:
            return claim.policy
    return ""
