"""A connection to a filesystem that fsspec reaches. It makes every request, and repeats the ones that fail briefly."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Final, TypeVar

import attrs
import fsspec.asyn
from fsspec import AbstractFileSystem

from checkpointer._secrets import Secrets, without_secrets
from checkpointer.errors import StorageError
from checkpointer.storage.driver_differences import (
    as_native_errors,
    as_os_errors,
    connect,
    escaped,
    files_below,
    is_link,
    unescaped,
)
from checkpointer.storage.reader import reader
from checkpointer.storage.retry import Retry, is_transient
from checkpointer.storage.unreadable import is_needed
from checkpointer.storage.url_protocols import EXTRAS, OBJECT_STORES, UNSAFE

T = TypeVar("T")

_LARGE: Final = 1 << 20


class Connection:
    """Requests to one folder of one filesystem, by paths relative to it. For the arguments see `FsspecStorage`."""

    def __init__(self, url: str, retry: Retry, options: Mapping[str, Any]) -> None:
        self.secrets = Secrets(url, options)
        self.retry = attrs.evolve(retry, hide=self.secrets.hide)
        self.protocol = url.partition("://")[0]
        self.is_object_store = self.protocol in OBJECT_STORES
        """Whether a file appears whole when its upload ends, and the store has neither folders nor renames."""
        self._unsafe = UNSAFE.get(self.protocol, "")
        self._url = url
        self._options = options
        self._impatient_until = 0.0
        with self.secrets.hidden():
            try:
                self.retry(self._connect, f"connecting to {self}")
            except StorageError:
                raise
            except Exception as error:
                raise self._cannot_connect(error) from error
        shared = isinstance(self.fs, fsspec.asyn.AsyncFileSystem)
        self.turn: contextlib.AbstractContextManager[Any] = contextlib.nullcontext() if shared else threading.RLock()
        """Held during each request, because the session of a synchronous driver serves one thread at a time."""

    def __str__(self) -> str:
        return without_secrets(self._url)

    @property
    def url(self) -> str:
        """The folder's URL as it was given, password included."""
        return self._url.rstrip("/")

    def _connect(self) -> None:
        self._folders: set[str] = set()
        try:
            self.fs, self.root = connect(self._url, self._options, self.retry.deadline_s)
        except (ImportError, ValueError) as error:
            extra = EXTRAS.get(self.protocol)
            package = f"pip install 'torch-checkpointer[{extra}]'" if extra else "see fsspec's list of filesystems"
            msg = f"no driver for {self.protocol}:// ({error}); install it: {package}"
            raise StorageError(msg) from error
        except Exception as error:
            if is_transient(error):
                raise
            raise self._cannot_connect(error) from error
        self._is_cut = False

    def _cannot_connect(self, error: Exception) -> StorageError:
        return StorageError(f"cannot connect to {self}: {type(error).__name__}: {error}")

    def full(self, path: str) -> str:
        """Return a path as the filesystem knows it."""
        return f"{self.root}/{escaped(path, self._unsafe)}" if path else self.root

    def attempt(self, what: str, do: Callable[[], T]) -> T:
        """Call ``do``, again after each transient failure. Every error is raised as an `OSError`."""
        with self.retrying(what) as retry:
            return retry(lambda: self._noting(do), f"{what} in {self}")

    @contextlib.contextmanager
    def retrying(self, what: str) -> Iterator[Retry]:
        """Yield the retries of a request: none, if the one before failed until its deadline, for as long again.

        Otherwise each request of the clean-up after a failed save would take the whole deadline. Every error is raised
        as an `OSError`.
        """
        is_patient = time.monotonic() >= self._impatient_until
        with self.secrets.hidden(), as_os_errors(what):
            try:
                yield self.retry if is_patient else attrs.evolve(self.retry, deadline_s=0.0)
            except Exception as error:
                if is_transient(error):
                    self._impatient_until = time.monotonic() + self.retry.deadline_s
                raise
        self._impatient_until = 0.0

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
        """Mark the session as cut if the error ends it. Object stores connect anew by themselves."""
        if is_transient(error) and not self.is_object_store:
            self._is_cut = True

    def close(self) -> None:
        """Close the session; the next request opens a new one."""
        if not self.is_object_store:
            client: Any = getattr(self.fs, "client", None)
            with self.turn, contextlib.suppress(Exception):
                getattr(client, "http", client).close()
            self._is_cut = True

    def find(self, prefix: str) -> dict[str, Mapping[str, Any]]:
        """Return the driver's details of every file at or below ``prefix``, by its path."""
        return self.attempt(f"listing {prefix!r}", lambda: self._find(prefix))

    def _find(self, prefix: str) -> dict[str, Mapping[str, Any]]:
        self.fs.invalidate_cache()
        folder = self.full(prefix)
        try:
            with as_native_errors():
                found = files_below(self.fs, folder, lambda name: is_needed(self._inside(name)))
                # Links are not followed, because the files behind them are not the manager's.
                if prefix and found and set(found) != {folder} and is_link(self.fs, folder):
                    found = {folder: {"size": 0}}
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except PermissionError:
            if is_needed(prefix, is_asked_for=True):
                raise
            return {prefix: {"size": 0}}
        return {self._inside(name): info for name, info in found.items()}

    def _inside(self, full: str) -> str:
        """Return the relative path of a path as the filesystem knows it."""
        # Some filesystems return names with their leading slash, some without.
        root = f"{self.root}/".lstrip("/")
        return unescaped(full.strip("/")[len(root) :], self._unsafe)

    def open(self, path: str) -> BinaryIO:
        """Open a file for reading. If the connection is cut, the stream opens the file again at its position."""
        with self.retrying(f"opening {path}") as retry:
            begin = functools.partial(self._noting, functools.partial(self._begin_reading, path))
            return reader(begin, path, retry, self.turn, self.secrets.hidden)

    def _begin_reading(self, path: str) -> Any:
        # Some drivers keep sizes from a listing. If the file was replaced since then, they read too little.
        self.fs.invalidate_cache()
        # An open file on a Windows share cannot be renamed or deleted unless its reader allows it.
        options = {"share_access": "rwd"} if self.protocol == "smb" else {}
        stream = self.fs.open(self.full(path), "rb", **options)
        # paramiko can request the next blocks of a large file before they are read.
        if hasattr(stream, "prefetch") and (size := stream.stat().st_size) > _LARGE:
            stream.prefetch(size)
        return stream

    def create(self, path: str) -> Any:
        """Open a new file for writing; its folders are made."""
        self.make_parents(path)
        return self.fs.open(self.full(path), "wb")

    def remove(self, path: str) -> None:
        """Delete one file; deleting a missing file succeeds."""
        self.attempt(f"deleting {path}", lambda: self._remove(path))

    def remove_all(self, paths: Sequence[str]) -> None:
        """Delete files as `remove` does, one after another."""
        for path in paths:
            self.remove(path)

    def _remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError), as_native_errors():
            try:
                self.fs.rm_file(self.full(path))
            except NotImplementedError:
                self.fs.rm(self.full(path))

    def make_parents(self, path: str) -> None:
        """Make the folders above a path, if the filesystem has folders."""
        folder = path.rpartition("/")[0]
        if not self.is_object_store and folder not in self._folders:
            self.fs.makedirs(self.full(folder), exist_ok=True)
            self._folders.add(folder)

    def forget_folders(self) -> None:
        """Make folders again when they are needed next, because another writer may have removed them."""
        self._folders.clear()

    def remove_empty_folders(self, path: str) -> None:
        """Remove empty folders: at and below the path, and above it up to the first that is not empty."""
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
            # Some servers remove a folder although it has files, so check first.
            with self.turn, contextlib.suppress(Exception):
                if self.fs.isdir(folder) and not self.fs.ls(folder, detail=False):
                    self._remove_folder(folder)
        self._folders.clear()

    def _remove_folder(self, folder: str) -> None:
        if type(self.fs).rmdir is not AbstractFileSystem.rmdir:
            self.fs.rmdir(folder)
        # sshfs has only the coroutine, behind a method that does nothing. WebHDFS deletes folders as it deletes files.
        elif hasattr(self.fs, "_rmdir"):
            fsspec.asyn.sync(self.fs.loop, self.fs._rmdir, folder)
        else:
            self.fs.rm(folder, recursive=False)
