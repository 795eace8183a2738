"""Storages: local disk, memory, and whatever fsspec reaches."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from checkpointer.errors import StorageError
from checkpointer.ports import Storage
from checkpointer.storage.local import LocalStorage
from checkpointer.storage.memory import MemoryStorage

__all__ = ["LocalStorage", "MemoryStorage", "open_storage"]


def open_storage(
    directory: str | os.PathLike[str] | Storage | None,
    owner: str,
    storage_options: Mapping[str, Any] | None = None,
) -> Storage:
    """Return the storage for a path, an fsspec URL, a storage of the user's own, or None for memory."""
    if directory is None:
        return MemoryStorage()
    if isinstance(directory, (str, os.PathLike)):
        path = os.fspath(directory)
        if not path:
            msg = "the directory is ''; name a folder such as 'runs/digits', or None to keep checkpoints in memory"
            raise StorageError(msg)
        protocol, separator, rest = path.partition("://")
        if not separator:
            return LocalStorage(path, owner)
        if protocol in ("file", "local"):
            return LocalStorage(rest, owner)
        from checkpointer.storage.remote import open_remote

        return open_remote(path, owner, storage_options or {})
    if isinstance(directory, Storage):
        return directory
    msg = f"the directory is {directory!r}; expected a path, a URL, a Storage, or None"
    raise StorageError(msg)
