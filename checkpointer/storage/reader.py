"""Reads a file although its connection is cut, or another process replaces it."""

from __future__ import annotations

import contextlib
import errno
import io
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, Final, cast

import attrs

from checkpointer.errors import RecordError
from checkpointer.ports import Storage, SupportsPaths
from checkpointer.storage.retry import Retry, is_transient

_BUFFER: Final = 1 << 20
_ATTEMPTS: Final = 5
"""If a small file is replaced during so many reads in a row, that is an error."""


def read_whole(open: Callable[[], BinaryIO], limit: int) -> bytes:
    """Read a file from its beginning, up to ``limit`` bytes; again if it is replaced meanwhile (``ESTALE``).

    A record is such a file: it is replaced whenever a metric is attached.
    """
    for left in reversed(range(_ATTEMPTS)):
        try:
            with open() as stream:
                return stream.read(limit)
        except OSError as error:
            if error.errno != errno.ESTALE or not left:
                raise
    raise AssertionError


def read_small(storage: Storage, path: str, limit: int) -> bytes:
    """Do as `read_whole` with a small file of this library, such as a record.

    Raises:
        FileNotFoundError: If it does not exist.
        RecordError: If it is a folder, or another user's file on a disk: this one file is foreign, not the directory.
    """
    try:
        return read_whole(lambda: storage.open(path), limit)
    except IsADirectoryError as error:
        msg = f"{path} is a folder, not a file of this library; it is left alone"
        raise RecordError(msg) from error
    except PermissionError as error:
        if not isinstance(storage, SupportsPaths):  # The credentials lack a permission.
            raise
        msg = f"{path} cannot be read, because this process lacks the permission; it is left alone"
        raise RecordError(msg) from error


def reader(
    begin: Callable[[], Any],
    path: str,
    retry: Retry,
    turn: contextlib.AbstractContextManager[Any],
    hidden: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> BinaryIO:
    """Return a seekable, buffered stream over the stream that ``begin`` opens, at first and after each cut.

    ``turn`` is held during each request, and ``hidden`` hides secrets in its errors.
    """
    return cast(BinaryIO, io.BufferedReader(_ResumingReader(begin, path, retry, turn, hidden), _BUFFER))


class SeekableReader(io.RawIOBase):
    """A raw stream that can be read and seeked."""

    def readable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def seekable(self) -> bool:
        """See `io.RawIOBase`."""
        return True


@attrs.define(eq=False, repr=False, slots=False)
class _ResumingReader(SeekableReader):
    _begin: Callable[[], Any]
    _path: str
    _retry: Retry
    _turn: contextlib.AbstractContextManager[Any]
    _hidden: Callable[[], contextlib.AbstractContextManager[None]]
    _stream: Any = attrs.field(default=None, init=False)
    _position: int = attrs.field(default=0, init=False)
    _has_read: bool = attrs.field(default=False, init=False)
    _is_cut: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        self._stream = self._retry(self._begin, f"opening {self._path}")
        self._identity = _identity(self._stream)

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with self._hidden():
            self._position = self._retry(lambda: self._seek(offset, whence), f"seeking in {self._path}")
        return self._position

    def readinto(self, buffer: Any) -> int:
        with self._hidden():
            data = self._retry(lambda: self._read(len(buffer)), f"reading {self._path}")
        buffer[: len(data)] = data
        self._has_read = self._has_read or bool(data)
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed and self._stream is not None:
            # The data has been read, so an error of the connection no longer matters.
            with self._turn, contextlib.suppress(Exception):
                self._stream.close()
        super().close()

    def _seek(self, offset: int, whence: int) -> int:
        with self._turn:
            stream = self._ready()
            stream.seek(offset, whence)
            # Some drivers' seek() does not return the position.
            return cast(int, stream.tell())

    def _read(self, size: int) -> bytes:
        try:
            with self._turn:
                stream = self._ready()
                # The end is known. If the file was replaced, a request beyond the end would fail a complete read.
                if self._position == _details(stream).get("size"):
                    return b""
                return cast(bytes, stream.read(size))
        except Exception as error:
            if "InvalidRange" in str(error):
                # A shorter file replaced it between the request for its size and this one.
                self._is_cut = True
                raise OSError(errno.EAGAIN, "the file was replaced while it was opened", self._path) from error
            self._is_cut = is_transient(error)
            if isinstance(error, OSError) or self._is_cut:
                raise
            msg = f"reading {self._path}: {type(error).__name__}: {error}"
            raise OSError(errno.EIO, msg) from error

    def _ready(self) -> Any:
        if self._is_cut:
            self._stream = self._begin()
            # If no byte of the old file was returned yet, the new file can be read instead.
            if self._has_read and _identity(self._stream) != self._identity:
                raise OSError(errno.ESTALE, "the file was replaced while it was read", self._path)
            self._identity = _identity(self._stream)
            self._stream.seek(self._position)
            self._is_cut = False
        return self._stream


def _details(stream: Any) -> Mapping[str, Any]:
    details = getattr(stream, "details", None)
    return details if isinstance(details, dict) else {}


def _identity(stream: Any) -> tuple[Any, ...]:
    return tuple(_details(stream).get(key) for key in ("size", "ETag", "etag", "generation", "mtime"))
