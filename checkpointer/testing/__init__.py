"""Helpers for tests of checkpointing: a storage in memory, a storage that dies, a clock, and the storage contract."""

from __future__ import annotations

from checkpointer.storage.memory import MemoryStorage
from checkpointer.testing.clock import FakeClock
from checkpointer.testing.contract import StorageContract
from checkpointer.testing.crashing import Crash, CrashingStorage, die

__all__ = ["Crash", "CrashingStorage", "FakeClock", "MemoryStorage", "StorageContract", "die"]
