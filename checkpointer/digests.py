"""Digests of payloads: xxh3-128 over a file's bytes, or over a folder's names, sizes and bytes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, BinaryIO, Final

import xxhash

from checkpointer.ports import Storage, SupportsLinks, Writable

__all__ = ["ALGORITHM", "DigestWriter", "digest_of", "files_of", "size_of"]

ALGORITHM: Final = "xxh3-128"
_CHUNK: Final = 4 << 20


class DigestWriter:
    """Passes bytes on, and digests and counts them on the way."""

    def __init__(self, stream: Writable) -> None:
        self._stream = stream
        self._hash = xxhash.xxh3_128()
        self.size = 0
        """Bytes written so far."""
        self.error: BaseException | None = None
        """What the stream raised first: a serialiser may go on to hide it behind an error of its own."""

    def write(self, data: Any) -> int:
        """Write all of ``data`` and return its length in bytes."""
        view = memoryview(data).cast("B")
        # In chunks that fit the cache: the write then reads what the hash has just brought in.
        for start in range(0, len(view), _CHUNK):
            chunk = view[start : start + _CHUNK]
            self._hash.update(chunk)
            self._pass_on(chunk)
        self.size += len(view)
        return len(view)

    def _pass_on(self, chunk: memoryview) -> None:
        try:
            self._stream.write(chunk)
        except BaseException as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        """Do nothing: some writers insist that a stream can be flushed."""

    @property
    def digest(self) -> str:
        """The digest so far."""
        return f"{ALGORITHM}:{self._hash.hexdigest()}"


def files_of(storage: Storage, path: str, expected: int | None = None) -> Mapping[str, int]:
    """Return the files of a payload and their sizes (bytes); of one that is no folder, itself; empty if it is gone.

    A listing may lag behind what was written, or deleted: unless it shows the size that is expected, a file is
    opened, and what can be opened is believed.
    """
    files = {name: stat.size for name, stat in storage.list(path).items()}
    # Where there are links a listing lags behind nothing, and the size it gives is how a link is told from a file.
    if files and (sum(files.values()) == expected or path not in files or isinstance(storage, SupportsLinks)):
        return files
    try:
        with storage.open(path) as stream:
            return {path: stream.seek(0, os.SEEK_END)}
    except (FileNotFoundError, IsADirectoryError):
        return {}


def size_of(storage: Storage, path: str, expected: int) -> int | None:
    """Return the size (bytes) of a payload that should have ``expected`` bytes; None if there is none."""
    files = files_of(storage, path, expected)
    return sum(files.values()) if files else None


def digest_of(storage: Storage, path: str) -> tuple[int, str] | None:
    """Return size (bytes) and digest of a payload, file or folder; None if there is none."""
    files = files_of(storage, path)
    if not files:
        return None
    digest = xxhash.xxh3_128()
    size = 0
    for name in sorted(files):
        if name != path:
            digest.update(f"{name[len(path) + 1 :]}\0{files[name]}\0".encode())
        with storage.open(name) as stream:
            size += _feed(digest, stream)
    return size, f"{ALGORITHM}:{digest.hexdigest()}"


def _feed(digest: Any, stream: BinaryIO) -> int:
    size = 0
    while chunk := stream.read(_CHUNK):
        digest.update(chunk)
        size += len(chunk)
    return size
