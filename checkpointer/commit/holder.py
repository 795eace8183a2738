"""Holds the run of one writer: claims its term, sends the heartbeats, and releases it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import attrs

from checkpointer.commit.heartbeat import Heartbeat, Status
from checkpointer.commit.journal import Journal
from checkpointer.commit.lease import Lease, claim_term
from checkpointer.ports import Storage


@attrs.define
class Holder:
    """Holds at most one term at a time; the journal has it."""

    _journal: Journal
    _policy: str
    """As YAML, for commands; empty if it is not known."""
    lease: Lease
    open_again: Callable[[], Storage]
    """Opens the storage for the heartbeat's thread."""
    status: Status
    """What the heartbeats say of the training."""
    _heartbeat: Heartbeat | None = attrs.field(default=None, init=False)

    def claim(self, run: str, label: str, *, is_new: bool) -> None:
        """Claim the next term of a run, and release the one before.

        Raises:
            RunInUseError: If another process trains the run.
        """
        journal = self._journal
        if journal.term is not None:
            journal.term.release()  # If that fails, this writer keeps its run: it must not hold two.
        self.stop_heartbeat()
        journal.term = None
        owner, storage = journal.owner, journal.storage
        term = claim_term(storage, run, label, owner, self.lease, journal.trust, is_new=is_new, policy=self._policy)
        journal.term = term
        self._heartbeat = Heartbeat(term, self.open_again, self.status)

    def let_go(self) -> None:
        """Release the term, so that the next process goes on at once."""
        self.stop_heartbeat()
        if self._journal.term is not None:
            with contextlib.suppress(OSError):
                self._journal.term.release()

    def stop_heartbeat(self) -> None:
        """Send no heartbeat any more: after the lease another process may take over."""
        if self._heartbeat is not None:
            self._heartbeat.stop()
