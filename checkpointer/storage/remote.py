"""Whatever fsspec reaches by URL, through one implementation; what differs is a capability, found out once."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, Final

from checkpointer.errors import StorageError
from checkpointer.ports import Stat, Upload
from checkpointer.storage.connection import Connection
from checkpointer.storage.drivers import as_os_errors, modified_s, stat_of
from checkpointer.storage.owner import is_dead, is_live
from checkpointer.storage.publish import REPLACING, STAGING, Publisher, owner_of
from checkpointer.storage.retry import Retry

__all__ = ["FsspecStorage"]

STALE_S: Final = 24 * 3600.0
"""What a writer left that cannot be asked is swept after this many seconds."""
SMALL: Final = 1 << 20
"""Payloads up to this many bytes are kept in memory and sent in one request."""


class FsspecStorage:
    """Files under an fsspec URL, such as ``sftp://host/runs/digits`` or ``gs://bucket/runs/digits``.

    Args:
        url: Any URL that fsspec knows. A password in it is never shown.
        owner: Id of the writer, from `checkpointer.storage.owner.new_owner`.
        retry: How long to go on trying when the server or the way to it fails.
        **options: What the filesystem takes (``storage_options``); never logged, never stored.

    Raises:
        StorageError: If the URL's driver is not installed or not known, or there is no connection.

    Example:
        >>> storage = FsspecStorage("memory://runs/digits")
        >>> storage.write("a/b", b"data")
        >>> storage.list()["a/b"].size
        4
        >>> storage.delete("a")
    """

    def __init__(self, url: str, owner: str = "", *, retry: Retry | None = None, **options: Any) -> None:
        self._connection = Connection(url, retry or Retry(), options)
        self._placing = Publisher(self._connection, owner)

    def __str__(self) -> str:
        return str(self._connection)

    # Storage

    def list(self, prefix: str = "") -> dict[str, Stat]:
        """See `Storage.list`; unfinished writes are not listed."""
        found = {n: info for n, info in self._connection.find(prefix).items() if not n.startswith(f"{STAGING}/")}
        if prefix and not found and not self._connection.is_object_store:
            found = self._connection.find(f"{REPLACING}/{prefix}")
        for path in [path for path in found if path.startswith(f"{REPLACING}/")]:
            info = found.pop(path)
            found.setdefault(path[len(REPLACING) + 1 :], info)
        return {path: stat_of(info, has_tags=self._connection.is_object_store) for path, info in found.items()}

    def open(self, path: str) -> BinaryIO:
        """See `Storage.open`."""
        try:
            return self._connection.open(path)
        except FileNotFoundError:
            if self._connection.is_object_store:
                raise
            with contextlib.suppress(FileNotFoundError):
                return self._connection.open(f"{REPLACING}/{path}")
            # It may have got its name since.
            return self._connection.open(path)
        except OSError as error:
            # Below a file, or a folder: drivers say anything.
            if path in self._connection.find(path):
                raise
            raise FileNotFoundError(errno.ENOENT, "no such file", path) from error

    def write(self, path: str, data: bytes) -> None:
        """See `Storage.write`."""
        self._placing.put(path, data)

    def delete(self, path: str) -> None:
        """See `Storage.delete`; folders above that are empty now go too."""
        # First what waits to replace it: dead in between, it would take its place.
        for prefix in (path,) if self._connection.is_object_store else (f"{REPLACING}/{path}", path):
            for name in sorted(self._connection.find(prefix)):
                self._connection.remove(name)
        self._connection.remove_empty_folders(path)

    def upload(self, path: str) -> Upload:
        """See `Storage.upload`."""
        return RemoteUpload(self._connection, self._placing, path)

    # SupportsURLs

    def url(self, path: str) -> str:
        """See `SupportsURLs.url`."""
        return f"{self._connection.url}/{path}"

    # SupportsCopy

    def copy(self, source: str, path: str) -> None:
        """See `SupportsCopy.copy`."""
        names = [*self._connection.find(source)]
        if not names:
            raise FileNotFoundError(errno.ENOENT, "there is nothing to copy", source)
        if self._placing.capabilities.copy == "client":
            raise OSError(errno.ENOTSUP, f"{self._connection.protocol}:// does not copy on the server", source)
        copies = [path + name[len(source) :] for name in names]
        if [*self._connection.find(path)] not in ([], copies):
            self.delete(path)
        for name, copy in zip(names, copies, strict=True):
            self._placing.copy(name, copy)

    # SupportsSweep

    def prepare(self) -> None:
        """See `SupportsSweep.prepare`; finds out what the server can do."""
        probe = f"{self._placing.staging}/probe"
        try:
            self._placing.put(probe, b"")
            self._connection.remove(probe)
            self.capabilities()
        except OSError as error:
            msg = f"cannot write to {self}: {error}; choose a directory that these credentials may write to"
            raise StorageError(msg) from error

    def sweep(self) -> int:
        """See `SupportsSweep.sweep`."""
        count = 0
        own = f"{self._placing.staging}/"
        found = {path: info for path, info in self._connection.find(STAGING).items() if not path.startswith(own)}
        now = self._now() if any(not is_dead(owner_of(path)) for path in found) else None
        for path, info in found.items():
            if _is_abandoned(path, info, now):
                with contextlib.suppress(OSError):
                    self._sweep_one(path)
                    count += 1
        return count

    def _now(self) -> float | None:
        """Return the server's time: this machine's clock may be wrong, and what a live writer needs would go."""
        path = f"{self._placing.staging}/now"
        try:
            self._placing.put(path, b"")
            return modified_s(self._connection.find(path).get(path, {}))
        except OSError:
            return None
        finally:
            with contextlib.suppress(OSError):
                self._connection.remove(path)

    def _sweep_one(self, path: str) -> None:
        self._connection.remove(path)
        self._connection.remove_empty_folders(path.rpartition("/")[0])

    def close(self) -> None:
        """See `SupportsSweep.close`."""
        with contextlib.suppress(OSError):
            for path in self._connection.find(self._placing.staging):
                self._sweep_one(path)
            self.delete(self._placing.staging)
        self._connection.close()

    # SupportsCapabilities

    def capabilities(self) -> Mapping[str, str]:
        """See `SupportsCapabilities.capabilities`."""
        return self._placing.capabilities.describe()


class RemoteUpload:
    """A payload on its way: small ones wait in memory, larger ones stream. See `checkpointer.ports.Upload`."""

    def __init__(self, connection: Connection, placing: Publisher, path: str) -> None:
        self._connection = connection
        self._placing = placing
        self._path = path
        self._buffer = bytearray()
        self._stream: StagedStream | None = None

    def write(self, data: Any) -> int:
        """See `Upload.write`."""
        view = memoryview(data).cast("B")
        if self._stream is None and len(self._buffer) + len(view) <= SMALL:
            self._buffer += view
            return len(view)
        if self._stream is None:
            self._stream = StagedStream(self._connection, self._placing, self._path)
            self._stream.write(self._buffer)
            self._buffer = bytearray()
        self._stream.write(view)
        return len(view)

    def finish(self) -> None:
        """See `Upload.finish`."""
        if self._stream is not None:
            self._stream.finish()

    def publish(self, *, replace: bool) -> None:
        """See `Upload.publish`."""
        if self._stream is not None:
            self._stream.publish(replace=replace)
        elif replace:
            self._placing.put(self._path, bytes(self._buffer))
        else:
            self._placing.create(self._path, bytes(self._buffer))

    def abort(self) -> None:
        """See `Upload.abort`."""
        if self._stream is not None:
            self._stream.abort()


class StagedStream:
    """A payload that is written to the staging folder, and renamed or copied to its name by the server."""

    def __init__(self, connection: Connection, placing: Publisher, path: str) -> None:
        self._connection = connection
        self._placing = placing
        self._path = path
        self._staged = ""
        self._size = 0
        self._stream = connection.attempt(f"staging {path}", self._begin)
        self._is_open = True

    def _begin(self) -> Any:
        self._staged = self._placing.new_staged()
        return self._connection.fs.open(self._connection.full(self._staged), "wb")

    def write(self, data: Any) -> None:
        """Send all of ``data``."""
        with self._errors():
            if hasattr(self._stream, "set_pipelined"):
                self._write_ahead(data)
            else:
                self._stream.write(data)
        self._size += len(data)

    def _write_ahead(self, data: Any) -> None:
        """Let paramiko send all blocks before it waits for the answers, but leave none of these unread.

        Whatever is asked of the session next would take them in and forget them; then this would wait for ever.
        """
        view = memoryview(data)
        self._stream.set_pipelined(True)
        self._stream.write(view[:-1])
        self._stream.set_pipelined(False)
        self._stream.write(view[-1:])

    def finish(self) -> None:
        """Make sure that all of it has arrived."""
        with self._errors():
            self._stream.close()
        there = self._connection.find(self._staged).get(self._staged, {}).get("size")
        if there != self._size:
            msg = f"{self._size} bytes of {self._path} were sent, and {there} have arrived"
            raise OSError(errno.EIO, msg)

    def publish(self, *, replace: bool) -> None:
        """Let it appear under its name."""
        self._placing.move(self._staged, self._path, replace=replace)
        self._is_open = False

    def abort(self) -> None:
        """Drop it, unless it is published."""
        if self._is_open:
            self._is_open = False
            with self._connection.turn, contextlib.suppress(Exception):
                self._stream.close()
            with contextlib.suppress(OSError):
                self._connection.remove(self._staged)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        # What was sent cannot be sent again from here; the next request will connect anew.
        try:
            with self._connection.turn, as_os_errors(f"sending {self._path}"):
                yield
        except OSError as error:
            self._connection.note(error.__cause__ if isinstance(error.__cause__, Exception) else error)
            raise


def _is_abandoned(path: str, info: Mapping[str, Any], now: float | None) -> bool:
    owner = owner_of(path)
    if is_dead(owner):
        return True
    modified = modified_s(info)
    return not is_live(owner) and now is not None and modified is not None and now - modified > STALE_S
