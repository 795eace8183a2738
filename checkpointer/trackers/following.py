"""What trackers share: they know the manager they listen to, and report when best or last has moved."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Literal

from checkpointer.ports import Listener
from checkpointer.records.record import Record

if TYPE_CHECKING:
    from checkpointer.manager import CheckpointManager

__all__ = ["Following", "Upload"]

Upload = Literal["all", "best", "none"]
"""Which checkpoints go to the tracker as files: each, each that is the best when it is saved or ranked, or none."""


class Following(Listener):
    """Base of the trackers: keeps the tracker's aliases on the records."""

    def __init__(self) -> None:
        self._manager: weakref.ref[CheckpointManager] | None = None
        self._reported: dict[str, str] = {}

    # What a tracker says

    def _put(self, record: Record, where: str, aliases: list[str]) -> None:
        """Take a checkpoint that is new to the tracker; ``where`` is its path or URL."""

    def _point(self, alias: str, record: Record) -> None:
        """Let ``best`` or ``last`` name another checkpoint."""

    # What the manager reports

    def on_opened(self, manager: CheckpointManager) -> None:
        """See `Listener.on_opened`."""
        self._manager = weakref.ref(manager)

    def on_saved(self, record: Record) -> None:
        """See `Listener.on_saved`."""
        self._follow(record)

    def on_attached(self, record: Record) -> None:
        """See `Listener.on_attached`."""
        self._follow(record)

    def _follow(self, record: Record) -> None:
        manager = self._manager() if self._manager is not None else None
        if manager is None:
            return
        now = {"best": manager.best, "last": manager.last}
        names = [alias for alias, target in now.items() if target is not None and target.name == record.name]
        self._put(record, manager.location(record.name), names)
        for alias, target in now.items():
            if target is not None and self._reported.get(alias) != target.token:
                self._reported[alias] = target.token
                self._point(alias, target)
