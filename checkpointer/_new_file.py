"""Writes a file of a person, such as a picture or exported weights: whole, or not at all."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from checkpointer.errors import NameTakenError, StorageError

_DESCRIPTOR: Final = re.compile(r"/dev/(?P<name>stdout|stderr)|(?:/dev|/proc/self)/fd/(?P<number>\d+)")


def is_stream(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a pipe, a terminal or another device: bytes go through it, and it is not replaced."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    is_stored = stat.S_ISREG(mode) or stat.S_ISDIR(mode)
    return not is_stored or bool(_DESCRIPTOR.fullmatch(os.fspath(path)))


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str], *, replaces: bool) -> Iterator[BinaryIO]:
    """Open a file that gets its name when the block ends; its bytes and its name are on the disk then.

    If the block fails, there is no file. A stream (see `is_stream`) gets the bytes at once.

    Raises:
        NameTakenError: If the file is there, unless this one ``replaces`` it.
        StorageError: If it cannot be written, for example because the disk is full. A file that is there stays.
    """
    if is_stream(path):
        with _translated(path), _opened_stream(path) as stream:
            yield stream
        return
    target = Path(os.path.realpath(path) if replaces else path)
    if not replaces and os.path.lexists(target):
        msg = f"{target} is there already; choose another name, or remove it first"
        raise NameTakenError(msg)
    staged = target.with_name(f".{target.name[-100:]}.{uuid.uuid4().hex[:8]}")
    try:
        with _translated(path, staged):
            with open(staged, "xb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            (os.replace if replaces else _link)(staged, target)
            with contextlib.suppress(PermissionError):  # A folder that may only be written to cannot be opened.
                sync_folder(target.parent)
    finally:
        with contextlib.suppress(OSError):
            staged.unlink(missing_ok=True)


def sync_folder(folder: Path) -> bool:
    """Make a folder's entries durable: without it a power loss undoes the rename. Return whether that is possible."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network mounts refuse fsync on a folder, and offer nothing stronger.
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
        return False
    finally:
        os.close(descriptor)
    return True


@contextlib.contextmanager
def _translated(path: str | os.PathLike[str], staged: Path | None = None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # An error of what is read in the block has the name of another file.
        if isinstance(error, StorageError) or error.filename not in (None, str(staged or path)):
            raise
        msg = f"cannot write {os.fspath(path)}: {error.strerror or error}"
        raise StorageError(msg) from error


def _opened_stream(path: str | os.PathLike[str]) -> BinaryIO:
    found = _DESCRIPTOR.fullmatch(os.fspath(path))
    if not found:
        return _Stream(io.FileIO(path, "wb"))
    # A second opening of a redirected stdout would begin at its start again.
    number = {"stdout": 1, "stderr": 2}.get(found["name"]) or int(found["number"])
    return _Stream(io.FileIO(os.dup(number), "wb"))


class _Stream(io.BufferedWriter):
    """Counts the bytes; a place within it cannot be sought."""

    _written = 0

    def write(self, data: bytes | bytearray | memoryview) -> int:  # type: ignore[override]
        self._written += (size := super().write(data))
        return size

    def tell(self) -> int:
        return self._written

    def seek(self, *_: object) -> int:
        raise io.UnsupportedOperation

    def seekable(self) -> bool:
        return False


def _link(staged: Path, target: Path) -> None:
    # A link never replaces a file that appeared meanwhile. A disk without links has a short race here.
    try:
        os.link(staged, target)
    except FileExistsError:
        msg = f"{target} appeared while it was written; it was left as it is"
        raise NameTakenError(msg) from None
    except OSError:
        os.replace(staged, target)
