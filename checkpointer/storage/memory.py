"""Storage in this process's memory: for ``directory=None``, and for fast tests."""

from __future__ import annotations

import errno
import io
import posixpath
from typing import Any, BinaryIO, Final

from checkpointer.errors import NameTakenError
from checkpointer.ports import Stat, Upload

_MAX_LINKS: Final = 40
"""Linux follows as many links in one path."""


class MemoryStorage:
    """Files in a dict. Symbolic and hard links work as on a disk.

    Example:
        >>> from checkpointer.testing import MemoryStorage
        >>> storage = MemoryStorage()
        >>> storage.write("a/b", b"data")
        >>> storage.list("a")["a/b"].size
        4
    """

    def __init__(self) -> None:
        self._files: dict[str, bytes] = {}
        self._links: dict[str, str] = {}
        self._versions: dict[str, int] = {}
        self._clock = 0

    def __str__(self) -> str:
        return "memory"

    def list(self, prefix: str = "") -> dict[str, Stat]:
        """See `Storage.list`."""
        names = (*self._files, *self._links)
        below = [n for n in names if not prefix or n == prefix or n.startswith(prefix + "/")]
        return {name: Stat(len(self._files.get(name, b"")), str(self._versions[name])) for name in below}

    def open(self, path: str) -> BinaryIO:
        """See `Storage.open`."""
        return io.BytesIO(self._read(path))

    def write(self, path: str, data: bytes) -> None:
        """See `Storage.write`."""
        self._put(path)
        self._files[path] = bytes(data)

    def delete(self, path: str) -> None:
        """See `Storage.delete`."""
        for name in self.list(path):
            self._files.pop(name, None)
            self._links.pop(name, None)

    def upload(self, path: str) -> Upload:
        """See `Storage.upload`."""
        return _MemoryUpload(self, path)

    def symlink(self, target: str, path: str) -> None:
        """See `SupportsLinks.symlink`."""
        self._put(path)
        self._links[path] = posixpath.normpath(target)

    def hardlink(self, target: str, path: str) -> None:
        """See `SupportsLinks.hardlink`."""
        self.write(path, self._read(target))

    def _read(self, path: str) -> bytes:
        target = self._resolve(path)
        if target not in self._files:
            raise FileNotFoundError(errno.ENOENT, "no such file in memory", path)
        return self._files[target]

    def _resolve(self, path: str) -> str:
        """Follow the links in a path, links to folders too. A loop ends at a path that does not exist."""
        for _ in range(_MAX_LINKS):
            link = next((link for link in self._links if f"{path}/".startswith(f"{link}/")), None)
            if link is None:
                break
            path = self._links[link] + path[len(link) :]
        return path

    def _put(self, path: str) -> None:
        self._clock += 1
        self._versions[path] = self._clock
        self._links.pop(path, None)
        self._files.pop(path, None)

    def _is_taken(self, path: str) -> bool:
        return bool(self.list(path))


class _MemoryUpload:
    """A payload that is not in the dict yet. See `checkpointer.ports.Upload`."""

    def __init__(self, storage: MemoryStorage, path: str) -> None:
        self._storage = storage
        self._path = path
        self._buffer = io.BytesIO()

    def write(self, data: Any) -> int:
        return self._buffer.write(data)

    def finish(self) -> None:
        pass

    def publish(self, *, replace: bool) -> None:
        if not replace and self._storage._is_taken(self._path):
            msg = f"{self._path} appeared while it was about to be written; nothing was replaced"
            raise NameTakenError(msg)
        self._storage.write(self._path, self._buffer.getvalue())

    def abort(self) -> None:
        self._buffer = io.BytesIO()
