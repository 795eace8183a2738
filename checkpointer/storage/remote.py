"""Whatever fsspec reaches by URL. The basics only: see the README for what is tested on which storage."""

from __future__ import annotations

import contextlib
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.core import has_magic, url_to_fs
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from checkpointer.errors import NameTakenError, StorageError
from checkpointer.ports import Stat

__all__ = ["FsspecStorage"]


class FsspecStorage:
    """Files under an fsspec URL, such as ``memory://runs/digits``.

    Args:
        url: Any URL that fsspec knows.
        **options: What the filesystem takes (``storage_options``); never logged, never stored.

    Raises:
        StorageError: If the URL's driver is not installed or not known.
    """

    def __init__(self, url: str, **options: Any) -> None:
        try:
            self._fs, root = url_to_fs(url, **options)
        except (ImportError, ValueError) as error:
            protocol = url.partition("://")[0]
            msg = f"no driver for {protocol}:// ({error}); install it, for example: pip install 'fsspec[{protocol}]'"
            raise StorageError(msg) from error
        self._root = root.rstrip("/")
        self._url = url

    def __str__(self) -> str:
        return self._url

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root

    def list(self, prefix: str = "") -> dict[str, Stat]:
        """See `Storage.list`."""
        self._fs.invalidate_cache()
        try:
            found = self._fs.find(self._path(prefix), detail=True)
        except FileNotFoundError:
            return {}
        # Filesystems differ in whether they return names with their leading slash.
        root = f"{self._root}/".lstrip("/")
        # For a single file some of them find a name without its details.
        return {name.lstrip("/")[len(root) :]: _stat(info or self._fs.info(name)) for name, info in found.items()}

    def open(self, path: str) -> BinaryIO:
        """See `Storage.open`."""
        try:
            return cast(BinaryIO, self._fs.open(self._path(path), "rb"))
        except (FileExistsError, NotADirectoryError) as error:
            raise FileNotFoundError(2, "there is a file where its folder would be", path) from error

    def write(self, path: str, data: bytes) -> None:
        """See `Storage.write`."""
        self._make_parents(path)
        self._fs.pipe_file(self._path(path), data)

    def delete(self, path: str) -> None:
        """See `Storage.delete`."""
        full = self._path(path)
        with contextlib.suppress(FileNotFoundError):
            if not has_magic(full):
                self._fs.rm(full, recursive=True)
                return
            # rm() would take the name for a pattern, and delete what matches it.
            for name in self._fs.find(full):
                self._fs.rm_file(name)

    def upload(self, path: str) -> FsspecUpload:
        """See `Storage.upload`."""
        self._make_parents(path)
        return FsspecUpload(self._fs, self._path(path))

    def copy(self, source: str, path: str) -> None:
        """See `SupportsCopy.copy`."""
        names = [*self.list(source)]
        if not names:
            raise FileNotFoundError(2, "there is nothing to copy", source)
        if names != [source] or self._fs.isdir(self._path(path)):
            self.delete(path)
        copies = [path + name[len(source) :] for name in names]
        for copy in copies:
            self._make_parents(copy)
        # By lists: a single name is taken for a pattern, and a folder that is there already gets the copy inside it.
        self._fs.copy([self._path(name) for name in names], [self._path(copy) for copy in copies])

    def _make_parents(self, path: str) -> None:
        self._fs.makedirs(self._path(path).rpartition("/")[0], exist_ok=True)


class FsspecUpload:
    """A payload that becomes visible when the filesystem commits it. See `checkpointer.ports.Upload`."""

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str) -> None:
        self._fs = fs
        self._path = path
        self._stream = _begin(fs, path)
        self._open = True

    def write(self, data: Any) -> int:
        """See `Upload.write`."""
        return cast(int, self._stream.write(data))

    def finish(self) -> None:
        """See `Upload.finish`."""
        self._stream.close()

    def publish(self, *, replace: bool) -> None:
        """See `Upload.publish`."""
        self._fs.invalidate_cache()
        if not replace and self._fs.exists(self._path):
            msg = f"{self._path} appeared while it was about to be written; nothing was replaced"
            raise NameTakenError(msg)
        self._stream.commit()
        self._open = False

    def abort(self) -> None:
        """See `Upload.abort`."""
        if self._open:
            self._open = False
            self._stream.discard()


def _begin(fs: fsspec.AbstractFileSystem, path: str) -> Any:
    if isinstance(fs, MemoryFileSystem):
        # Its open() ignores autocommit, and would show an empty file at once.
        return MemoryFile(fs, path)
    stream = fs.open(path, "wb", autocommit=False)
    # It is now on the list of a transaction that nobody began: kept in memory, and committed by the next one.
    with contextlib.suppress(ValueError):
        fs.transaction.files.remove(stream)
    return stream


def _stat(info: dict[str, Any]) -> Stat:
    version = next((info[key] for key in ("ETag", "etag", "mtime", "LastModified", "created") if info.get(key)), "")
    return Stat(int(info.get("size") or 0), str(version))
