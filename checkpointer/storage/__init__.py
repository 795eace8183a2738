"""Storages: local disk, memory, and every URL that fsspec reaches."""

from checkpointer.storage.local import LocalStorage
from checkpointer.storage.memory import MemoryStorage
from checkpointer.storage.opening import open_storage

__all__ = ["LocalStorage", "MemoryStorage", "open_storage"]
