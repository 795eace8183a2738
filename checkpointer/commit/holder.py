"""Holds the run of one writer: claims its term, sends the heartbeats, and releases it.

`BEATS` in `checkpointer.commit.lease` is the number of heartbeats in one lease.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable

import attrs

from checkpointer.commit.journal import Journal
from checkpointer.commit.lease import Lease, claim_term
from checkpointer.commit.terms import Term
from checkpointer.ports import Storage

_log = logging.getLogger("checkpointer")


@attrs.define
class Holder:
    """Holds at most one term at a time; the journal has it."""

    _journal: Journal
    _policy: str
    """As YAML, for commands; empty if it is not known."""
    lease: Lease
    open_again: Callable[[], Storage]
    """Opens the storage for the heartbeat's thread."""
    _status: Callable[[], str]
    """Returns one line for each heartbeat. It refers to no manager, because the thread must not keep one alive."""
    _ended: threading.Event = attrs.field(factory=threading.Event, init=False)

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
        journal.term, self._ended = term, threading.Event()
        work = (self._ended, term, self.open_again, self._status)
        threading.Thread(target=_keep_beating, args=work, name="checkpointer-heartbeat", daemon=True).start()

    def let_go(self) -> None:
        """Release the term, so that the next process goes on at once."""
        self.stop_heartbeat()
        if self._journal.term is not None:
            with contextlib.suppress(OSError):
                self._journal.term.release()

    def stop_heartbeat(self) -> None:
        """Send no heartbeat any more: after the lease another process may take over."""
        self._ended.set()


def _keep_beating(ended: threading.Event, term: Term, open: Callable[[], Storage], status: Callable[[], str]) -> None:
    storage: Storage | None = None
    number = 0
    while not ended.wait(term.beat_s):
        number += 1
        try:
            storage = storage or open()
            term.beat(storage, number, _read(status))
        except Exception as error:  # Without a heartbeat another process may take over. Training goes on.
            _log.debug("no heartbeat could be written: %r", error)
            storage = None
        except BaseException:  # The process ends.
            return


def _read(status: Callable[[], str]) -> str:
    try:
        return status()
    except Exception as error:  # The heartbeat matters more than what it says.
        _log.debug("the heartbeat has no status: %r", error)
        return ""
