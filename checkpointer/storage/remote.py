"""Every URL that fsspec reaches, through one implementation. Servers differ in capabilities, which are probed once."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, Final

from checkpointer.errors import StorageError
from checkpointer.ports import Stat, Upload
from checkpointer.storage.connection import Connection
from checkpointer.storage.driver_differences import as_os_errors, modified_s, stat_of
from checkpointer.storage.owner import STAGING, is_abandoned
from checkpointer.storage.publish import REPLACING, Publisher, owner_of
from checkpointer.storage.retry import Retry

_SMALL: Final = 1 << 20
"""Payloads up to this many bytes are kept in memory and sent in one request."""


class FsspecStorage:
    """Files under an fsspec URL, such as ``sftp://host/runs/digits`` or ``gs://bucket/runs/digits``.

    Args:
        url: Any URL that fsspec knows. A password in it is never shown.
        owner: Id of the writer, from `checkpointer.storage.owner.new_owner`.
        retry: How long to repeat a request when the server or the network fails.
        **options: Options of the filesystem (``storage_options``); never logged, never stored.

    Raises:
        StorageError: If the URL's driver is not installed or not known, or the connection fails.

    Example:
        >>> storage = FsspecStorage("memory://runs/digits")
        >>> storage.write("a/b", b"data")
        >>> storage.list()["a/b"].size
        4
        >>> storage.delete("a")
    """

    def __init__(self, url: str, owner: str = "", *, retry: Retry | None = None, **options: Any) -> None:
        self._connection = Connection(url, retry or Retry(), options)
        self._publisher = Publisher(self._connection, owner)

    def __str__(self) -> str:
        return str(self._connection)

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
            # Meanwhile it may have got its name.
            return self._connection.open(path)
        except OSError as error:
            # If the path is a folder or lies below a file, drivers raise different errors.
            if path in self._connection.find(path):
                raise
            raise FileNotFoundError(errno.ENOENT, "no such file", path) from error

    def write(self, path: str, data: bytes) -> None:
        """See `Storage.write`."""
        self._publisher.put(path, data)

    def delete(self, path: str) -> None:
        """See `Storage.delete`; the folders above that are empty then are removed too."""
        # The waiting replacement is deleted first, because after a crash in between it would appear under the name.
        for prefix in (path,) if self._connection.is_object_store else (f"{REPLACING}/{path}", path):
            self._connection.remove_all(sorted(self._connection.find(prefix)))
        self._connection.remove_empty_folders(path)

    def upload(self, path: str) -> Upload:
        """See `Storage.upload`."""
        return BufferedUpload(self._publisher, path, lambda: _StagedStream(self._connection, self._publisher, path))

    def url(self, path: str) -> str:
        """See `SupportsURLs.url`."""
        return f"{self._connection.url}/{path}"

    def copy(self, source: str, path: str) -> None:
        """See `SupportsCopy.copy`."""
        names = [*self._connection.find(source)]
        if not names:
            raise FileNotFoundError(errno.ENOENT, "there is nothing to copy", source)
        if not self._publisher.capabilities.copies:
            raise OSError(errno.ENOTSUP, f"{self._connection.protocol}:// does not copy on the server", source)
        copies = [path + name[len(source) :] for name in names]
        if [*self._connection.find(path)] not in ([], copies):
            self.delete(path)
        for name, copy in zip(names, copies, strict=True):
            self._publisher.copy(name, copy)

    def prepare(self) -> None:
        """See `SupportsSweep.prepare`; probes what the server can do."""
        probe = f"{self._publisher.staging}/probe"
        try:
            self._publisher.put(probe, b"")
            self._connection.remove(probe)
            self.capabilities()
        except OSError as error:
            msg = f"cannot write to {self}: {error}; choose a directory that these credentials may write to"
            raise StorageError(msg) from error

    def sweep(self) -> int:
        """See `SupportsSweep.sweep`."""
        count = 0
        own = f"{self._publisher.staging}/"
        now = functools.cache(self.server_time)
        for path, info in self._connection.find(STAGING).items():
            if not path.startswith(own) and is_abandoned(owner_of(path), functools.partial(_age_s, info, now)):
                with contextlib.suppress(OSError):
                    self._sweep_one(path)
                    count += 1
        return count

    def server_time(self) -> float | None:
        """See `SupportsServerTime.server_time`."""
        # If this machine's clock were used and were wrong, a live writer's files might be swept.
        path = f"{self._publisher.staging}/now"
        try:
            self._publisher.put(path, b"")
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
            for path in self._connection.find(self._publisher.staging):
                self._sweep_one(path)
            self.delete(self._publisher.staging)
        self._connection.close()

    def capabilities(self) -> Mapping[str, str]:
        """See `SupportsCapabilities.capabilities`."""
        can = self._publisher.capabilities
        rename = "rename" if can.replaces else "two renames (readers check both names)"
        return {
            "replace": "PUT" if self._connection.is_object_store else rename,
            "create": "refused by the server" if can.refuses else "by claims (the server would overwrite)",
            "copy": "on the server" if can.copies else "through this process",
        }


class BufferedUpload:
    """An upload that keeps a payload of up to ``small`` bytes in memory, and passes a larger one to ``begin()``."""

    def __init__(self, publisher: Publisher, path: str, begin: Callable[[], Upload], *, small: int = _SMALL) -> None:
        self._publisher = publisher
        self._path = path
        self._begin = begin
        self._small = small
        self._buffer = io.BytesIO()
        self._stream: Upload | None = None

    def write(self, data: Any) -> int:
        """See `Upload.write`."""
        view = memoryview(data).cast("B")
        if self._stream is None and self._buffer.tell() + len(view) <= self._small:
            return self._buffer.write(view)
        if self._stream is None:
            self._stream = self._begin()
            self._stream.write(self._buffer.getbuffer())
            self._buffer = io.BytesIO()
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
            self._publisher.put(self._path, self._buffer.getvalue())
        else:
            self._publisher.create(self._path, self._buffer.getvalue())

    def abort(self) -> None:
        """See `Upload.abort`."""
        if self._stream is not None:
            self._stream.abort()


class _StagedStream:
    """A payload that is written to the staging folder, and renamed or copied to its name by the server."""

    def __init__(self, connection: Connection, publisher: Publisher, path: str) -> None:
        self._connection = connection
        self._publisher = publisher
        self._path = path
        self._staged = ""
        self._size = 0
        self._stream = connection.attempt(f"staging {path}", self._begin)
        self._is_open = True

    def _begin(self) -> Any:
        self._staged = self._publisher.new_staged()
        return self._connection.create(self._staged)

    def write(self, data: Any) -> int:
        with self._errors():
            if hasattr(self._stream, "set_pipelined"):
                # With it, paramiko sends all blocks before it reads the replies. The last byte goes without it, so that
                # no reply stays unread: the next request would consume that reply, and this stream would wait forever.
                self._stream.set_pipelined(True)
                self._stream.write(data[:-1])
                self._stream.set_pipelined(False)
                self._stream.write(data[-1:])
            else:
                self._stream.write(data)
        self._size += len(data)
        return len(data)

    def finish(self) -> None:
        with self._errors():
            self._stream.close()
        arrived = self._connection.find(self._staged).get(self._staged, {}).get("size")
        if arrived != self._size:
            msg = f"{self._size} bytes of {self._path} were sent, and {arrived} have arrived"
            raise OSError(errno.EIO, msg)

    def publish(self, *, replace: bool) -> None:
        self._publisher.move(self._staged, self._path, replace=replace)
        self._is_open = False

    def abort(self) -> None:
        if self._is_open:
            self._is_open = False
            with self._connection.turn, contextlib.suppress(Exception):
                self._stream.close()
            with contextlib.suppress(OSError):
                self._connection.remove(self._staged)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        # The sent bytes are not kept in memory, so they cannot be sent again. The next request connects anew.
        try:
            connection = self._connection
            with connection.secrets.hidden(), connection.turn, as_os_errors(f"sending {self._path}"):
                yield
        except OSError as error:
            self._connection.note(error.__cause__ if isinstance(error.__cause__, Exception) else error)
            raise


def _age_s(info: Mapping[str, Any], now: Callable[[], float | None]) -> float | None:
    modified, now_s = modified_s(info), now()
    return None if modified is None or now_s is None else now_s - modified
