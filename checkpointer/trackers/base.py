"""The base class of the trackers: it reports each change of the best and the newest checkpoint."""

from __future__ import annotations

import importlib
import weakref
from typing import TYPE_CHECKING, Any, Literal

from checkpointer.ports import Listener
from checkpointer.records.record import Record

if TYPE_CHECKING:
    from checkpointer.manager import CheckpointManager

Upload = Literal["all", "best", "none"]
"""The checkpoints that the tracker gets as files: all, those that are the best when saved or ranked, or none."""


class Following(Listener):
    """Base of the trackers: keeps the tracker's aliases on the records."""

    def __init__(self, upload: Upload = "all") -> None:
        self._manager: weakref.ref[CheckpointManager] | None = None
        self._upload = upload
        self._reported: dict[str, str] = {}
        self._there: set[str] = set()
        """The checkpoints that the tracker has, by `_identity`."""
        self._step = 0
        """Step of the checkpoint that was saved or ranked last."""

    def _package(self, module: str, extra: str) -> Any:
        """Import the tracker's package; if it is not installed, the error names the extra."""
        try:
            return importlib.import_module(module)
        except ImportError as error:
            msg = f"{type(self).__name__} needs {extra}: pip install 'torch-checkpointer[{extra}]'"
            raise ImportError(msg) from error

    def _identity(self, record: Record) -> str:
        return record.token

    def _put(self, record: Record, where: str, aliases: list[str]) -> None:
        """Take a checkpoint that is new to the tracker; ``where`` is its path or URL."""

    def _point(self, alias: str, record: Record) -> None:
        """Let ``best`` or ``last`` name another checkpoint."""

    def on_opened(self, manager: CheckpointManager) -> None:
        """See `Listener.on_opened`."""
        self._manager = weakref.ref(manager)

    def on_saved(self, record: Record) -> None:
        """See `Listener.on_saved`."""
        manager = self._manager() if self._manager is not None else None
        if manager is None:
            return
        now = {"best": manager.best, "last": manager.last}
        names = [alias for alias, target in now.items() if target is not None and target.name == record.name]
        is_wanted = self._upload == "all" or (self._upload == "best" and "best" in names)
        self._step = record.step
        if is_wanted and self._identity(record) not in self._there:
            self._put(record, manager.location(record.name), names)
            self._there.add(self._identity(record))
        for alias, target in now.items():
            if target is not None and self._reported.get(alias) != target.token:
                self._reported[alias] = target.token
                self._point(alias, target)

    on_attached = on_saved
