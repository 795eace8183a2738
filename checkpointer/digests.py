"""Digests of payloads: xxh3-128 over a file's bytes, or over a folder's names, sizes and bytes."""

from __future__ import annotations

from typing import Any, Final

import xxhash

from checkpointer.ports import Storage, Writable

__all__ = ["ALGORITHM", "DigestWriter", "FolderDigest", "digest_of"]

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


class FolderDigest:
    """Digests a folder that is read file by file, in the order of their names, as `digest_of` does."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()
        self.size = 0
        """Bytes so far."""

    def begin(self, inside: str, size: int) -> None:
        """Go on with the file of this path inside the folder and this size in bytes."""
        self._hash.update(f"{inside}\0{size}\0".encode())

    def update(self, chunk: bytes) -> None:
        """Go on with these bytes."""
        self._hash.update(chunk)
        self.size += len(chunk)

    @property
    def digest(self) -> str:
        """The digest so far."""
        return f"{ALGORITHM}:{self._hash.hexdigest()}"


def digest_of(storage: Storage, path: str) -> tuple[int, str] | None:
    """Return size (bytes) and digest of a payload, file or folder; None if there is none."""
    files = storage.list(path)
    if not files:
        return None
    digest = FolderDigest()
    for name in sorted(files):
        if name != path:
            digest.begin(name[len(path) + 1 :], files[name].size)
        with storage.open(name) as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    return digest.size, digest.digest
