"""A storage whose payloads wait at a gate, so that a test decides when a save ends."""

from __future__ import annotations

import threading
from typing import Any

from checkpointer import CheckpointManager
from checkpointer.ports import Upload
from checkpointer.testing import MemoryStorage

PATIENCE_S = 60.0
"""Only a failing test waits so long, in seconds."""


class GatedStorage(MemoryStorage):
    """Its gate is open at first. While it is shut, payloads stay unpublished. ``broken`` is raised by every payload."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.arrived = threading.Semaphore(0)
        """Released once for each payload that reaches the gate."""
        self.broken: BaseException | None = None
        self.deleting = threading.Event()
        """Set as soon as a payload is to be deleted ..."""
        self.may_delete = threading.Event()
        """... which waits for this."""
        self.may_delete.set()

    def upload(self, path: str) -> Any:
        upload = super().upload(path)
        return upload if path.startswith(".checkpointer") else _GatedUpload(upload, self)

    def delete(self, path: str) -> None:
        if not path.startswith(".checkpointer"):
            self.deleting.set()
            assert self.may_delete.wait(PATIENCE_S), "the delete was not allowed"
        super().delete(path)

    def shut(self) -> None:
        self.gate.clear()

    def open_gate(self) -> None:
        self.gate.set()

    def await_arrival(self) -> None:
        assert self.arrived.acquire(timeout=PATIENCE_S), "no payload reached the gate"


class _GatedUpload:
    def __init__(self, inner: Upload, storage: GatedStorage) -> None:
        self._inner = inner
        self._storage = storage

    def write(self, data: Any) -> int:
        return self._inner.write(data)

    def finish(self) -> None:
        self._storage.arrived.release()
        if threading.current_thread() is not threading.main_thread():  # The main thread would wait for itself.
            assert self._storage.gate.wait(PATIENCE_S), "the gate was not opened"
        if self._storage.broken is not None:
            raise self._storage.broken
        self._inner.finish()

    def publish(self, *, replace: bool) -> None:
        self._inner.publish(replace=replace)

    def abort(self) -> None:
        self._inner.abort()


class _Opening(threading.Condition):
    """Opens a gate when a thread waits for this condition."""

    def __init__(self, storage: GatedStorage, lock: Any) -> None:
        super().__init__(lock)
        self._storage = storage

    def wait(self, timeout: float | None = None) -> bool:
        self._storage.open_gate()
        return super().wait(timeout)


def open_when_waited_for(manager: CheckpointManager, storage: GatedStorage) -> None:
    """Open the gate at the moment when the loop waits for the writer, not earlier."""
    assert manager._executor.background is not None
    manager._executor.background._condition = _Opening(storage, manager._executor.background._lock)
