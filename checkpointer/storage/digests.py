"""Digests of payloads: over a file's bytes, or over a folder's names, sizes and bytes."""

from __future__ import annotations

import io
import os
import types
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, Final

from checkpointer.errors import CorruptError
from checkpointer.ports import Storage, SupportsLinks, Writable
from checkpointer.records.digest_algorithms import ALGORITHM, CRYPTOGRAPHIC, DIGESTS, OF_FILES
from checkpointer.storage.reader import SeekableReader

_CHUNK: Final = 4 << 20
_BLOCK: Final = 1 << 20


def algorithm_of(digest: str) -> str:
    """Return the algorithm that a record's digest names."""
    return digest.partition(":")[0]


def algorithm_of_files(digest: str) -> str:
    """Return the algorithm of each file's digest, if a folder's digest is that of its files' digests."""
    return algorithm_of(digest).removeprefix(OF_FILES)


def is_cryptographic(digest: str) -> bool:
    """Return whether it is infeasible to make other bytes with the same digest."""
    return algorithm_of_files(digest) == CRYPTOGRAPHIC


def digest_of_files(files: Mapping[str, tuple[int, str]], algorithm: str) -> tuple[int, str]:
    """Return size (bytes) and digest of a folder, from size and digest (hex digits) of each of its files.

    ``algorithm`` is that of the files' digests. No byte of a file is read.
    """
    whole = DIGESTS[algorithm]()
    for inside in sorted(files):
        size, digits = files[inside]
        whole.update(f"{inside}\0{size}\0{digits}\0".encode(errors="surrogateescape"))
    return sum(size for size, _ in files.values()), f"{OF_FILES}{algorithm}:{whole.hexdigest()}"


class _Digest:
    def __init__(self, algorithm: str) -> None:
        if algorithm not in DIGESTS:
            known = ", ".join(DIGESTS)
            msg = f"the digest algorithm {algorithm!r} is not known (known: {known}); upgrade torch-checkpointer"
            raise CorruptError(msg)
        self.algorithm = algorithm
        self._hash: Any = DIGESTS[algorithm]()
        self.size = 0
        """Bytes so far."""

    def update(self, chunk: bytes | memoryview) -> None:
        """Add these bytes."""
        self._hash.update(chunk)
        self.size += len(chunk)

    @property
    def digest(self) -> str:
        """The digest so far."""
        return f"{self.algorithm}:{self._hash.hexdigest()}"


class DigestWriter(_Digest):
    """Writes bytes to a stream, and digests and counts them. ``note`` is called with their number so far."""

    def __init__(
        self, stream: Writable, algorithm: str = ALGORITHM, note: Callable[[int], object] = lambda size: None
    ) -> None:
        super().__init__(algorithm)
        self._stream = stream
        self._note = note
        self.error: BaseException | None = None
        """The stream's first exception, because a serialiser may raise another one in its place."""

    def write(self, data: Any) -> int:
        """Write all of ``data`` and return its length in bytes."""
        view = memoryview(data).cast("B")
        # In chunks that fit the cache, so that the write reads what the hash has just loaded.
        for start in range(0, len(view), _CHUNK):
            chunk = view[start : start + _CHUNK]
            self.update(chunk)
            try:
                self._stream.write(chunk)
            except BaseException as error:
                self.error = self.error or error
                raise
            self._note(self.size)
        return len(view)

    def flush(self) -> None:
        """Do nothing; some serialisers call it."""

    @property
    def descriptor(self) -> int | None:
        """See `SupportsDescriptor.descriptor`."""
        return getattr(self._stream, "descriptor", None)

    def count_to(self, size: int) -> None:
        """See `SupportsDescriptor.count_to`."""
        self._note(size)

    def start_over(self) -> None:
        """See `SupportsDescriptor.start_over`."""
        self._stream.start_over()  # type: ignore[attr-defined]  # It has a descriptor.
        self._note(0)

    def take_over(self, size: int, hexdigest: str) -> None:
        """See `SupportsDescriptor.take_over`."""
        self.count_to(size)
        self.size, self._hash = size, types.SimpleNamespace(hexdigest=lambda: hexdigest)


class FolderDigest(_Digest):
    """Digests a folder that is read file by file, in the order of their names, as `digest_of` does."""

    def __init__(self, algorithm: str) -> None:
        super().__init__(algorithm.removeprefix(OF_FILES))
        self._is_of_files = algorithm.startswith(OF_FILES)
        self._files: dict[str, tuple[int, str]] = {}
        self._inside, self._begun = "", 0

    def begin(self, inside: str, size: int) -> None:
        """Begin the next file: its path inside the folder, and its size in bytes."""
        if self._is_of_files:
            self._end_file()
            self._inside = inside
        else:
            self._hash.update(f"{inside}\0{size}\0".encode(errors="surrogateescape"))

    def _end_file(self) -> None:
        if self._inside or self.size > self._begun:
            self._files[self._inside] = self.size - self._begun, self._hash.hexdigest()
        self._inside, self._begun, self._hash = "", self.size, DIGESTS[self.algorithm]()

    @property
    def files(self) -> Mapping[str, tuple[int, str]]:
        """Size (bytes) and digest of each file, if the folder's digest is that of its files' digests."""
        if self._is_of_files:
            self._end_file()
        return self._files

    @property
    def digest(self) -> str:
        """The digest so far."""
        return digest_of_files(self.files, self.algorithm)[1] if self._is_of_files else super().digest


def files_of(storage: Storage, path: str, expected: int | None = None) -> Mapping[str, int]:
    """Return a payload's files and their sizes (bytes). A file is its own only entry; a missing payload has none.

    A listing may be older than the last write or deletion. If it does not show the expected size, the file is opened,
    and the opened file counts.
    """
    files = {name: stat.size for name, stat in storage.list(path).items()}
    # Storages with links list consistently; the listed size also distinguishes a symlink from a file.
    if files and (sum(files.values()) == expected or path not in files or isinstance(storage, SupportsLinks)):
        return files
    try:
        with storage.open(path) as stream:
            return {path: stream.seek(0, os.SEEK_END)}
    except (FileNotFoundError, IsADirectoryError):
        return {}


def size_of(storage: Storage, path: str, expected: int) -> int | None:
    """Return the size (bytes) of a payload that should have ``expected`` bytes; None if it is missing."""
    files = files_of(storage, path, expected)
    return sum(files.values()) if files else None


def digest_of(storage: Storage, path: str, algorithm: str) -> tuple[int, str] | None:
    """Return size (bytes) and digest of a payload, file or folder; None if it is missing."""
    digest = read_digest(storage, path, algorithm)
    return None if digest is None else (digest.size, digest.digest)


def read_digest(storage: Storage, path: str, algorithm: str) -> FolderDigest | None:
    """Do as `digest_of`, and return the digests of its files, too."""
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
    return digest


class Blocks:
    """The digest of each block of a file. ``whole`` gets all of its bytes: it is the digest of the payload."""

    def __init__(self, stream: BinaryIO, whole: FolderDigest) -> None:
        self.new: Final = DIGESTS[whole.algorithm]
        self.digests: Final[list[bytes]] = []
        self.size = 0
        """Bytes of the file."""
        while block := _read_fully(stream, _BLOCK):
            whole.update(block)
            self.digests.append(self.new(block).digest())
            self.size += len(block)


class VerifiedReader(SeekableReader):
    """Returns only bytes that were digested before.

    A payload is read twice, to verify it and to load it. In between an attacker may replace its bytes for a moment.
    Therefore the first read keeps a digest of each block, and each block of the second read must have it.
    """

    def __init__(self, stream: BinaryIO, blocks: Blocks) -> None:
        self._stream = stream
        self._blocks = blocks
        self.error: CorruptError | None = None
        """Set if a block has changed, because a format may raise another error in its place."""
        self._position = 0
        self._held = -1
        self._block = b""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """See `io.RawIOBase`."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._blocks.size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        """See `io.RawIOBase`; returns at most the rest of one block."""
        view = memoryview(buffer).cast("B")
        number, offset = divmod(self._position, _BLOCK)
        if number >= len(self._blocks.digests):
            return 0
        data = memoryview(self._verified(number))[offset : offset + len(view)]
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _verified(self, number: int) -> bytes:
        if number != self._held:
            self._stream.seek(number * _BLOCK)
            block = _read_fully(self._stream, _BLOCK)
            if self._blocks.new(block).digest() != self._blocks.digests[number]:
                self.error = CorruptError("it changed between being verified and being read; nothing of it was used")
                raise self.error
            self._held, self._block = number, block
        return self._block

    def close(self) -> None:
        """See `io.IOBase`."""
        self._stream.close()
        super().close()


def _read_fully(stream: BinaryIO, size: int) -> bytes:
    """Read ``size`` bytes, or the rest of the stream, because some streams return less than they have."""
    block = stream.read(size)
    while block and len(block) < size and (more := stream.read(size - len(block))):
        block += more
    return block
