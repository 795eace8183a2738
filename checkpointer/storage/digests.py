"""Digests of payloads: over a file's bytes, or over a folder's names, sizes and bytes."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, Final

import xxhash

from checkpointer.errors import CorruptError
from checkpointer.ports import Storage, SupportsLinks, Writable

__all__ = [
    "ALGORITHM",
    "CRYPTOGRAPHIC",
    "DigestWriter",
    "FolderDigest",
    "VerifiedReader",
    "algorithm_of",
    "digest_of",
    "files_of",
    "is_cryptographic",
    "size_of",
]

ALGORITHM: Final = "xxh3-128"
"""Finds every accident, at the speed of memory."""
CRYPTOGRAPHIC: Final = "sha256"
"""Cannot be forged: under trust, where somebody may try."""

_NEW: Final[dict[str, Callable[[], Any]]] = {ALGORITHM: xxhash.xxh3_128, CRYPTOGRAPHIC: hashlib.sha256}
_CHUNK: Final = 4 << 20
_BLOCK: Final = 1 << 20


def algorithm_of(digest: str) -> str:
    """Return the algorithm that a record's digest names."""
    return digest.partition(":")[0]


def is_cryptographic(digest: str) -> bool:
    """Return whether nobody can make other bytes with the same digest."""
    return algorithm_of(digest) == CRYPTOGRAPHIC


def _new(algorithm: str) -> Any:
    if algorithm not in _NEW:
        msg = f"the digest algorithm {algorithm!r} is not known (known: {', '.join(_NEW)}); upgrade torch-checkpointer"
        raise CorruptError(msg)
    return _NEW[algorithm]()


class DigestWriter:
    """Passes bytes on, and digests and counts them on the way."""

    def __init__(self, stream: Writable, algorithm: str = ALGORITHM) -> None:
        self._stream = stream
        self._algorithm = algorithm
        self._hash = _new(algorithm)
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
        return f"{self._algorithm}:{self._hash.hexdigest()}"


class FolderDigest:
    """Digests a folder that is read file by file, in the order of their names, as `digest_of` does."""

    def __init__(self, algorithm: str) -> None:
        self._algorithm = algorithm
        self._hash = _new(algorithm)
        self.size = 0
        """Bytes so far."""

    def begin(self, inside: str, size: int) -> None:
        """Go on with the file of this path inside the folder and this size in bytes."""
        self._hash.update(f"{inside}\0{size}\0".encode(errors="surrogateescape"))

    def update(self, chunk: bytes) -> None:
        """Go on with these bytes."""
        self._hash.update(chunk)
        self.size += len(chunk)

    @property
    def digest(self) -> str:
        """The digest so far."""
        return f"{self._algorithm}:{self._hash.hexdigest()}"


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


def digest_of(storage: Storage, path: str, algorithm: str) -> tuple[int, str] | None:
    """Return size (bytes) and digest of a payload, file or folder; None if there is none."""
    files = files_of(storage, path)
    if not files:
        return None
    digest = FolderDigest(algorithm)
    for name in sorted(files):
        if name != path:
            digest.begin(name[len(path) + 1 :], files[name])
        with storage.open(name) as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    return digest.size, digest.digest


class VerifiedReader(io.RawIOBase):
    """Digests a payload at once, and then hands on only the very bytes that it has digested.

    A payload is read twice: to verify it, and to load it. In between somebody may put other bytes there, and the old
    ones back afterwards. So the first read keeps a digest of each block, and what the second reads must have it.
    """

    def __init__(self, stream: BinaryIO, algorithm: str) -> None:
        super().__init__()
        self._stream = stream
        self._new: Final = _NEW[algorithm]
        self._blocks: list[bytes] = []
        whole = self._new()
        self.size = 0
        """Bytes of the payload."""
        while block := _read_fully(stream, _BLOCK):
            whole.update(block)
            self._blocks.append(self._digest(block))
            self.size += len(block)
        self.digest: Final = f"{algorithm}:{whole.hexdigest()}"
        """The digest of the whole payload."""
        self.error: CorruptError | None = None
        """That a block had changed: a format may hide it behind an error of its own."""
        self._position = 0
        self._held = -1
        self._block = b""

    def _digest(self, block: bytes) -> bytes:
        digest = self._new()
        digest.update(block)
        return bytes(digest.digest())

    def readable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def seekable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def tell(self) -> int:
        """See `io.RawIOBase`."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """See `io.RawIOBase`."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        """See `io.RawIOBase`; hands on at most the rest of one block."""
        view = memoryview(buffer).cast("B")
        number, offset = divmod(self._position, _BLOCK)
        if number >= len(self._blocks):
            return 0
        data = memoryview(self._verified(number))[offset : offset + len(view)]
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _verified(self, number: int) -> bytes:
        if number != self._held:
            self._stream.seek(number * _BLOCK)
            block = _read_fully(self._stream, _BLOCK)
            if self._digest(block) != self._blocks[number]:
                self.error = CorruptError("it changed between being verified and being loaded; nothing was restored")
                raise self.error
            self._held, self._block = number, block
        return self._block


def _read_fully(stream: BinaryIO, size: int) -> bytes:
    """Read ``size`` bytes, or what is left of the stream: not every stream gives all it has at once."""
    block = stream.read(size)
    while block and len(block) < size and (more := stream.read(size - len(block))):
        block += more
    return block
