"""Opens the storage for a path or a URL, and says what to check if that storage fails."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from checkpointer._secrets import without_secrets
from checkpointer.errors import StorageError
from checkpointer.ports import Storage, SupportsPaths
from checkpointer.storage.local import LocalStorage
from checkpointer.storage.memory import MemoryStorage
from checkpointer.storage.unreadable import permission_advice

Where = str | os.PathLike[str] | Storage
"""A path, an fsspec URL, or a storage of the user's own."""


def open_storage(directory: Where | None, owner: str, storage_options: Mapping[str, Any] | None = None) -> Storage:
    """Return the storage for a path, an fsspec URL, a storage of the user's own, or None for memory."""
    if directory is None:
        return MemoryStorage()
    if isinstance(directory, (str, os.PathLike)):
        _refuse_cached(directory)
        path = os.fspath(directory)
        if not path:
            msg = "the directory is ''; name a folder such as 'runs/digits', or None to keep checkpoints in memory"
            raise StorageError(msg)
        protocol, separator, rest = path.partition("://")
        if not separator or protocol in ("file", "local"):
            return LocalStorage(rest if separator else path, owner)
        if "::" in protocol:
            _refuse_chain(path)
        options = storage_options or {}
        if protocol in ("s3", "s3a"):  # It has multipart uploads.
            from checkpointer.storage.s3 import S3Storage

            return S3Storage(path, owner, **options)
        from checkpointer.storage.remote import FsspecStorage

        return FsspecStorage(path, owner, **options)
    if isinstance(directory, Storage):
        return directory
    msg = f"the directory is {without_secrets(repr(directory))}; expected a path, a URL, a Storage, or None"
    if url := _url_of(directory):
        msg = f"{msg}; pass its URL, {without_secrets(url)!r}, and storage_options= what it was made with"
    raise StorageError(msg)


def _url_of(thing: Any) -> str:
    """Return the URL of an object whose text is one, such as a ``UPath``; empty for anything else."""
    return str(thing) if re.fullmatch(r"[a-z][a-z0-9+.-]*://\S+", str(thing)) else ""


def _refuse_cached(directory: str | os.PathLike[str]) -> None:
    """Refuse an object whose text is a URL, such as a ``CloudPath``: its path is a cache on this disk."""
    url = str(directory)
    protocol, separator, _ = url.partition("://")
    if separator and not isinstance(directory, str) and protocol not in ("file", "local"):
        kind = type(directory).__name__
        msg = f"the directory is a {kind}, and its path is a cache on this disk; pass its URL, {without_secrets(url)!r}"
        raise StorageError(msg)


def _refuse_chain(url: str) -> None:
    """Refuse a URL of a filesystem within another one. Those that cache give the old file after a move or a removal."""
    inner = url.rpartition("::")[2]
    msg = (
        f"the directory {without_secrets(url)!r} is a chain of filesystems (::), which is not supported: a cache of "
        f"fsspec would give files that are gone; pass the URL of the last one, {without_secrets(inner)!r}, and its "
        "options alone"
    )
    raise StorageError(msg)


@contextlib.contextmanager
def advising(storage: Storage, what: str) -> Iterator[None]:
    """Let errors of the block say what to check; ``what`` is done with the storage, such as ``"read"``."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        msg = f"cannot {what} {storage}: {error}; {access_advice(storage, error)}"
        raise StorageError(msg) from error


def access_advice(storage: Storage, error: OSError) -> str:
    """Return what to check after a storage raised ``error``."""
    if not isinstance(storage, SupportsPaths):
        return "check the path or URL, the credentials and the network"
    if error.errno == errno.EACCES:  # EPERM means that no mode allows it, such as a rename on some mounts.
        return permission_advice(error.filename or storage.local_path(""))
    return "check the path and the disk or mount that it is on"
