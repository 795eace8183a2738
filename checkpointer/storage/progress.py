"""A storage that tells how many bytes are read from it, so that others can show how far they are."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, Final, cast

from checkpointer.ports import Stat, Storage, SupportsLinks, SupportsPaths, Upload

__all__ = ["CountingStorage"]


class CountingStorage:
    """Another storage, whose files are counted as they are read.

    Args:
        storage: The other.
        on_bytes: Told how many bytes were read, each time some were.

    Example:
        >>> from checkpointer.testing import MemoryStorage
        >>> storage = MemoryStorage()
        >>> storage.write("a", b"data")
        >>> counts = []
        >>> CountingStorage(storage, counts.append).open("a").read()
        b'data'
        >>> sum(counts)
        4
    """

    def __new__(cls, storage: Storage, on_bytes: Callable[[int], object]) -> CountingStorage:
        """Return one that has paths and links if the other has: whoever verifies asks for them."""
        paths, links = isinstance(storage, SupportsPaths), isinstance(storage, SupportsLinks)
        return object.__new__(_KINDS[paths, links])

    def __init__(self, storage: Storage, on_bytes: Callable[[int], object]) -> None:
        self._storage = storage
        self._on_bytes = on_bytes

    def __str__(self) -> str:
        return str(self._storage)

    def list(self, prefix: str = "") -> Mapping[str, Stat]:
        """See `Storage.list`."""
        return self._storage.list(prefix)

    def open(self, path: str) -> BinaryIO:
        """See `Storage.open`."""
        counted = _Counted(self._storage.open(path), self._on_bytes)
        return cast(BinaryIO, io.BufferedReader(counted, 1 << 20))

    def write(self, path: str, data: bytes) -> None:
        """See `Storage.write`."""
        self._storage.write(path, data)

    def delete(self, path: str) -> None:
        """See `Storage.delete`."""
        self._storage.delete(path)

    def upload(self, path: str) -> Upload:
        """See `Storage.upload`."""
        return self._storage.upload(path)


class _WithPaths(CountingStorage):
    def local_path(self, path: str) -> str:
        return cast(SupportsPaths, self._storage).local_path(path)

    def stage(self, path: str) -> tuple[str, Upload]:
        return cast(SupportsPaths, self._storage).stage(path)

    def sync(self, path: str) -> None:
        cast(SupportsPaths, self._storage).sync(path)


class _WithLinks(CountingStorage):
    def symlink(self, target: str, path: str) -> None:
        cast(SupportsLinks, self._storage).symlink(target, path)

    def hardlink(self, target: str, path: str) -> None:
        cast(SupportsLinks, self._storage).hardlink(target, path)


class _WithBoth(_WithPaths, _WithLinks):
    pass


_KINDS: Final[dict[tuple[bool, bool], type[CountingStorage]]] = {
    (False, False): CountingStorage,
    (True, False): _WithPaths,
    (False, True): _WithLinks,
    (True, True): _WithBoth,
}


class _Counted(io.RawIOBase):
    def __init__(self, stream: BinaryIO, on_bytes: Callable[[int], object]) -> None:
        super().__init__()
        self._stream = stream
        self._on_bytes = on_bytes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def readinto(self, buffer: Any, /) -> int:
        chunk = self._stream.read(len(buffer))
        buffer[: len(chunk)] = chunk
        self._on_bytes(len(chunk))
        return len(chunk)

    def close(self) -> None:
        self._stream.close()
        super().close()
