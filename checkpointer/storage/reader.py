"""A remote file for reading that survives a cut connection: it opens anew, and goes on where it was."""

from __future__ import annotations

import contextlib
import errno
import io
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, Final, cast

from checkpointer.storage.retry import Retry, is_transient

__all__ = ["reader"]

_BUFFER: Final = 1 << 20


def reader(begin: Callable[[], Any], path: str, retry: Retry, turn: contextlib.AbstractContextManager[Any]) -> BinaryIO:
    """Return a seekable, buffered stream over what ``begin`` opens, now and after each cut.

    ``turn`` is held during each request.
    """
    return cast(BinaryIO, io.BufferedReader(_Resuming(begin, path, retry, turn), _BUFFER))


class _Resuming(io.RawIOBase):
    def __init__(
        self, begin: Callable[[], Any], path: str, retry: Retry, turn: contextlib.AbstractContextManager[Any]
    ) -> None:
        self._begin = begin
        self._path = path
        self._retry = retry
        self._turn = turn
        self._stream: Any = None
        self._stream = retry(begin, f"opening {path}")
        self._identity = _identity(self._stream)
        self._position = 0
        self._has_read = False
        self._is_cut = False

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = self._retry(lambda: self._seek(offset, whence), f"seeking in {self._path}")
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._retry(lambda: self._read(len(buffer)), f"reading {self._path}")
        buffer[: len(data)] = data
        self._has_read = self._has_read or bool(data)
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed and self._stream is not None:
            # What was read is read, whatever becomes of the connection.
            with self._turn, contextlib.suppress(Exception):
                self._stream.close()
        super().close()

    def _seek(self, offset: int, whence: int) -> int:
        with self._turn:
            stream = self._ready()
            stream.seek(offset, whence)
            # Not every driver's seek() says where it went.
            return cast(int, stream.tell())

    def _read(self, size: int) -> bytes:
        try:
            with self._turn:
                stream = self._ready()
                # Its end is known: asking for more, of a file that was replaced, would fail what is read already.
                if self._position == _size(stream):
                    return b""
                return cast(bytes, stream.read(size))
        except Exception as error:
            if "InvalidRange" in str(error):
                # It was replaced by a shorter one between the question how long it is and this one.
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
            # As long as nothing of the old file was handed on, the new one is as good.
            if self._has_read and _identity(self._stream) != self._identity:
                raise OSError(errno.ESTALE, "the file was replaced while it was read", self._path)
            self._identity = _identity(self._stream)
            self._stream.seek(self._position)
            self._is_cut = False
        return self._stream


def _details(stream: Any) -> Mapping[str, Any]:
    details = getattr(stream, "details", None)
    return details if isinstance(details, dict) else {}


def _size(stream: Any) -> int | None:
    return _details(stream).get("size")


def _identity(stream: Any) -> tuple[Any, ...]:
    return tuple(_details(stream).get(key) for key in ("size", "ETag", "etag", "generation", "mtime"))
