"""What the manager's writer thread has done, until the training thread hears of it.

The training thread alone shows, and tells loggers and subclasses: at the first batch end after the file is there.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import Any, Final

import attrs

from checkpointer import CheckpointManager
from checkpointer.ports import Listener
from checkpointer_lightning.attributes import ShownState

__all__ = ["BackgroundEvents", "News"]

_log: Final = logging.getLogger("checkpointer")


@attrs.frozen
class News:
    """What rank 0 tells the others of the writer thread."""

    saved: tuple[str, ...]
    """Names of what is durable since the last news."""
    retired: tuple[str, ...]
    is_idle: bool
    """Whether nothing is under way any more."""
    account: ShownState


@attrs.define(eq=False)
class BackgroundEvents(Listener):
    """Takes notes on the writer thread of rank 0."""

    is_busy: bool = False
    """Whether something was handed over that the training thread has not heard the end of; the same on every rank."""
    has_waited: bool = False
    _saved: deque[str] = attrs.field(factory=deque)
    _retired: deque[str] = attrs.field(factory=deque)

    def on_saved(self, record: Any) -> None:
        """See `Listener.on_saved`. A rescue is no news to loggers."""
        if record.kind == "regular":
            self._saved.append(record.name)

    def on_retired(self, record: Any) -> None:
        """See `Listener.on_retired`."""
        self._retired.append(record.name)

    def has_news(self, manager: CheckpointManager | None) -> bool:
        """Return whether what was handed over has come to its end, on rank 0."""
        return self.is_busy and manager is not None and not _unfinished(manager)

    def wait(self, manager: CheckpointManager, step: int, timeout: float | None) -> None:
        """Wait until nothing is under way, ``timeout`` seconds at most, and say so if it takes time.

        Raises what failed.
        """
        running = _unfinished(manager)
        started = time.monotonic()
        manager.wait(timeout)
        if running:
            level = logging.INFO if self.has_waited else logging.WARNING
            self.has_waited = True
            waited = time.monotonic() - started
            _log.log(level, "step %d: waited %.3g s for %s to be written", step, waited, running[0])

    def take(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the names of what was saved and retired since the last call."""
        return _drained(self._saved), _drained(self._retired)


def _unfinished(manager: CheckpointManager) -> tuple[str, ...]:
    status = manager.session.background_status
    return status.unfinished if status is not None else ()


def _drained(names: deque[str]) -> tuple[str, ...]:
    return tuple(names.popleft() for _ in range(len(names)))
