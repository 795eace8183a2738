"""Passes the events of rank 0's writer thread on to the training thread."""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import Any, Final

import attrs

from checkpointer import CheckpointManager
from checkpointer.ports import Listener

_log: Final = logging.getLogger("checkpointer")


@attrs.define(eq=False)
class BackgroundEvents(Listener):
    """Queues the events of rank 0's writer thread until the training thread collects them."""

    is_pending: bool = False
    """Whether the end of a save or an attachment was not collected yet; the same on every rank."""
    _has_waited: bool = False
    _events: deque[tuple[str, bool]] = attrs.field(factory=deque)

    def on_saved(self, record: Any) -> None:
        """See `Listener.on_saved`."""
        if record.kind == "regular":  # Loggers are not called for a rescue.
            self._events.append((record.name, True))

    def on_retired(self, record: Any) -> None:
        """See `Listener.on_retired`."""
        self._events.append((record.name, False))

    def is_ready(self, manager: CheckpointManager | None) -> bool:
        """Return whether all pending work of the writer thread has ended, on rank 0."""
        return self.is_pending and manager is not None and not _unfinished(manager)

    def wait(self, manager: CheckpointManager, step: int, timeout: float | None) -> None:
        """Wait at most ``timeout`` seconds until the writer thread is idle, and log a wait. Raises what failed."""
        running = _unfinished(manager)
        started = time.monotonic()
        manager.wait(timeout)
        if running:
            level = logging.INFO if self._has_waited else logging.WARNING
            self._has_waited = True
            waited = time.monotonic() - started
            _log.log(level, "step %d: waited %.3g s for %s to be written", step, waited, running[0])

    def take(self) -> list[tuple[str, bool]]:
        """Return the names since the last call, each with whether it was saved; else it was retired."""
        return [self._events.popleft() for _ in range(len(self._events))]


def _unfinished(manager: CheckpointManager) -> tuple[str, ...]:
    status = manager.session.background_status
    return status.unfinished if status is not None else ()
