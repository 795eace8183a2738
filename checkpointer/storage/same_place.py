"""Refuses one place under two names, because the rules of one side would delete checkpoints that the other keeps."""

from __future__ import annotations

import os
import uuid

from checkpointer._secrets import without_secrets
from checkpointer.errors import StorageError
from checkpointer.ports import Storage
from checkpointer.storage.local import LocalStorage
from checkpointer.storage.opening import Where


class SamePlaceError(StorageError):
    """A permanent error: another attempt will fail too."""


def refuse_same(source: Storage, where: Where) -> None:
    """Raise `StorageError` if both are the same place, because each side's rules would retire the other's files."""
    if isinstance(source, LocalStorage) and isinstance(where, LocalStorage):
        same = os.path.realpath(source.local_path("")) == os.path.realpath(where.local_path(""))
    elif isinstance(where, (str, os.PathLike)):
        same = _place(source) == _place(where)
    else:
        same = source is where
    if same:
        raise _is_same(where)


def refuse_same_by_trial(source: Storage, mirror: Storage) -> None:
    """Raise `StorageError` if a file written to one appears in the other, because one place has many spellings."""
    path = f".checkpointer/mirror-{uuid.uuid4().hex}"
    mirror.write(path, b"")
    try:
        if source.list(path):
            raise _is_same(mirror)
    finally:
        mirror.delete(path)


def _is_same(where: Where) -> SamePlaceError:
    return SamePlaceError(f"the mirror {without_secrets(str(where))} is the directory itself; name another place")


def _place(where: Where) -> str:
    """Return a path or URL in one spelling, without access to the disk."""
    if not isinstance(where, (str, os.PathLike)):
        return str(where).rstrip("/")
    text = without_secrets(os.fspath(where))
    protocol, separator, rest = text.partition("://")
    if separator and protocol not in ("file", "local"):
        return text.rstrip("/")
    return os.path.abspath(os.path.expanduser(rest if separator else text))
