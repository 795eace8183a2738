"""What a test of checkpointing needs: storages that are fast or that die, a clock that obeys, the storage contract."""

from __future__ import annotations

from checkpointer.storage.memory import MemoryStorage
from checkpointer.testing.clock import FakeClock
from checkpointer.testing.contract import StorageContract
from checkpointer.testing.crashing import Crash, CrashingStorage, die

__all__ = ["Crash", "CrashingStorage", "FakeClock", "MemoryStorage", "StorageContract", "die"]
