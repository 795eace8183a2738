"""A connection to a filesystem that fsspec reaches: every request goes through here, and is tried again if need be."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, Final, TypeVar

import attrs
import fsspec.asyn
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from checkpointer.errors import StorageError
from checkpointer.storage.drivers import (
    SILENCE_S,
    as_native_errors,
    as_os_errors,
    bound_silence,
    disconnect,
    escaped,
    unescaped,
    with_silence_bounded,
    without_password,
)
from checkpointer.storage.listing import files_below, is_link
from checkpointer.storage.reader import reader
from checkpointer.storage.retry import Retry, is_transient

__all__ = ["Connection"]

T = TypeVar("T")

_OBJECT_STORES: Final = frozenset({"abfs", "abfss", "az", "gcs", "gs", "memory", "oci", "oss", "s3", "s3a"})

_UNSAFE: Final = {"smb": '"*:<>?|', "webdav": "#%*?[]", "webhdfs": "#%*?[]{}", "hdfs": "#%*?[]{}"}
"""Characters that the server refuses, or that the driver takes for something else than part of a name."""
_LARGE: Final = 1 << 20
_EXTRAS: Final = {
    "s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure",
    "sftp": "sftp", "ssh": "sftp", "smb": "smb", "webdav": "webdav", "hdfs": "hdfs", "webhdfs": "webhdfs",
}  # fmt: skip


class Connection:
    """Requests to one folder of one filesystem, by paths relative to it.

    Args:
        url: Any URL that fsspec knows.
        retry: How long to go on trying when the server or the way to it fails.
        options: What the filesystem takes (``storage_options``).

    Raises:
        StorageError: If the URL's driver is not installed or not known, or there is no connection.
    """

    def __init__(self, url: str, retry: Retry, options: Mapping[str, Any]) -> None:
        self.retry = retry
        self.protocol = url.partition("://")[0]
        self.is_object_store = self.protocol in _OBJECT_STORES
        """Whether a file appears whole when its upload ends, and there are neither folders nor renames."""
        self._unsafe = _UNSAFE.get(self.protocol, "")
        self._url = url
        self._options = options
        self._hurry_until = 0.0
        try:
            self.retry(self._connect, f"connecting to {self}")
        except StorageError:
            raise
        except Exception as error:
            msg = f"cannot connect to {self}: {type(error).__name__}: {error}"
            raise StorageError(msg) from error
        shared = isinstance(self.fs, fsspec.asyn.AsyncFileSystem)
        self.turn: contextlib.AbstractContextManager[Any] = contextlib.nullcontext() if shared else threading.RLock()
        """Held during each request: the session of a driver that is not asynchronous takes one thread at a time."""

    def __str__(self) -> str:
        return without_password(self._url)

    @property
    def url(self) -> str:
        """The folder's URL as it was given, password included."""
        return self._url.rstrip("/")

    def _connect(self) -> None:
        self._folders: set[str] = set()
        try:
            options = with_silence_bounded(self.protocol, self._options)
            self.fs, root = url_to_fs(self._url, skip_instance_cache=True, **options)
            # Without a deadline there is one attempt, and that has its time.
            bound_silence(self.fs, min(SILENCE_S, self.retry.deadline_s or SILENCE_S))
        except (ImportError, ValueError) as error:
            extra = _EXTRAS.get(self.protocol)
            package = f"pip install 'torch-checkpointer[{extra}]'" if extra else "see fsspec's list of filesystems"
            msg = f"no driver for {self.protocol}:// ({error}); install it: {package}"
            raise StorageError(msg) from error
        except Exception as error:
            if is_transient(error):
                raise
            msg = f"cannot connect to {self}: {type(error).__name__}: {error}"
            raise StorageError(msg) from error
        self.root = root.rstrip("/")
        self._is_cut = False

    def full(self, path: str) -> str:
        """Return a path as the filesystem knows it."""
        return f"{self.root}/{escaped(path, self._unsafe)}" if path else self.root

    def attempt(self, what: str, do: Callable[[], T]) -> T:
        """Do it, again if the failure is transient; every error comes out as an `OSError`."""
        with as_os_errors(what), self.giving_up():
            return self.patience(lambda: self._noting(do), f"{what} in {self}")

    @property
    def patience(self) -> Retry:
        """How long to try now: just once for as long again as a request was tried in vain.

        Else clearing up after a save that failed would take the deadline once more, for each request.
        """
        return attrs.evolve(self.retry, deadline_s=0.0) if time.monotonic() < self._hurry_until else self.retry

    @contextlib.contextmanager
    def giving_up(self) -> Iterator[None]:
        """Remember whether this request, with all its attempts, came through."""
        try:
            yield
        except Exception as error:
            if is_transient(error):
                self._hurry_until = time.monotonic() + self.retry.deadline_s
            raise
        self._hurry_until = 0.0

    def _noting(self, do: Callable[[], T]) -> T:
        with self.turn:
            try:
                if self._is_cut:
                    self._connect()
                with as_native_errors():
                    return do()
            except Exception as error:
                self.note(error)
                raise

    def note(self, error: Exception) -> None:
        """Remember that a session does not survive this error; object stores connect anew by themselves."""
        if is_transient(error) and not self.is_object_store:
            self._is_cut = True

    def close(self) -> None:
        """Close the session; the next request opens another one."""
        if not self.is_object_store:
            with self.turn:
                disconnect(self.fs)
            self._is_cut = True

    def find(self, prefix: str) -> dict[str, Mapping[str, Any]]:
        """Return what the driver says of every file at or below ``prefix``, by its path."""
        return self.attempt(f"listing {prefix!r}", lambda: self._find(prefix))

    def _find(self, prefix: str) -> dict[str, Mapping[str, Any]]:
        self.fs.invalidate_cache()
        try:
            with as_native_errors():
                found = files_below(self.fs, self.full(prefix))
                # Links are not followed: what lies there is somebody else's.
                if prefix and found and set(found) != {self.full(prefix)} and is_link(self.fs, self.full(prefix)):
                    found = {self.full(prefix): {"size": 0}}
        except (FileNotFoundError, NotADirectoryError):
            return {}
        # Filesystems differ in whether they return names with their leading slash.
        root = f"{self.root}/".lstrip("/")
        return {unescaped(name.strip("/")[len(root) :], self._unsafe): info for name, info in found.items()}

    def open(self, path: str) -> BinaryIO:
        """Open a file for reading; the stream opens anew where it was when the connection is cut."""
        with as_os_errors(f"opening {path}"), self.giving_up():
            return reader(lambda: self._noting(lambda: self._begin_reading(path)), path, self.patience, self.turn)

    def _begin_reading(self, path: str) -> Any:
        # Some remember the sizes that a listing gave: of a file that was replaced since, they read too little.
        self.fs.invalidate_cache()
        # A file on a Windows share cannot be renamed or deleted while it is open, unless its reader agrees.
        options = {"share_access": "rwd"} if self.protocol == "smb" else {}
        stream = self.fs.open(self.full(path), "rb", **options)
        # paramiko's: ask for the next blocks of a large file before they are needed.
        if hasattr(stream, "prefetch") and (size := stream.stat().st_size) > _LARGE:
            stream.prefetch(size)
        return stream

    def remove(self, path: str) -> None:
        """Delete one file; what is not there is deleted already."""
        self.attempt(f"deleting {path}", lambda: self._remove(path))

    def _remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError), as_native_errors():
            try:
                self.fs.rm_file(self.full(path))
            except NotImplementedError:
                self.fs.rm(self.full(path))

    def make_parents(self, path: str) -> None:
        """Make the folders above a path, where there are folders."""
        folder = path.rpartition("/")[0]
        if not self.is_object_store and folder not in self._folders:
            self.fs.makedirs(self.full(folder), exist_ok=True)
            self._folders.add(folder)

    def forget_folders(self) -> None:
        """Make folders anew when they are needed next: another writer may have removed them."""
        self._folders.clear()

    def remove_empty_folders(self, path: str) -> None:
        """Remove the folders that are empty now: at and below the path, and above it as far as they are."""
        if self.is_object_store:
            return
        folders: list[str] = []
        with self.turn, contextlib.suppress(Exception):
            self.fs.invalidate_cache()
            below = self.fs.find(self.full(path), withdirs=True)
            folders = sorted((name for name in below if len(name) > len(self.full(path))), key=len, reverse=True)
        folders.append(self.full(path))
        if not path.startswith(".checkpointer/"):
            parts = path.split("/")[:-1]
            folders += [self.full("/".join(parts[:count])) for count in range(len(parts), 0, -1)]
        for folder in folders:
            # Not every server refuses to remove a folder with files in it: look first.
            with self.turn, contextlib.suppress(Exception):
                if self.fs.isdir(folder) and not self.fs.ls(folder, detail=False):
                    self._remove_folder(folder)
        self._folders.clear()

    def _remove_folder(self, folder: str) -> None:
        if type(self.fs).rmdir is not AbstractFileSystem.rmdir:
            self.fs.rmdir(folder)
        # Behind a method that does nothing, sshfs has a coroutine, and WebHDFS deletes folders as it does files.
        elif hasattr(self.fs, "_rmdir"):
            fsspec.asyn.sync(self.fs.loop, self.fs._rmdir, folder)
        else:
            self.fs.rm(folder, recursive=False)
