"""What fsspec's drivers say, in one language: errors, times and versions, which each of them words differently."""

from __future__ import annotations

import contextlib
import datetime
import errno
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import fsspec

from checkpointer.ports import Stat

__all__ = [
    "SILENCE_S",
    "as_native_errors",
    "as_os_errors",
    "bound_silence",
    "copy",
    "disconnect",
    "escaped",
    "is_refusal",
    "modified_s",
    "rename",
    "stat_of",
    "unescaped",
    "with_silence_bounded",
    "without_password",
]

_REFUSALS: Final = ("precondition", "pre-condition", "already exists", "alreadyexists")
_TIMES: Final = ("LastModified", "last_modified", "mtime", "modified", "updated", "last_write_time", "created")
_MILLISECONDS: Final = ("modificationTime", "modification_time")
_VERSIONS: Final = ("ETag", "etag", "generation", "md5Hash")


@contextlib.contextmanager
def as_os_errors(what: str) -> Iterator[None]:
    """Let whatever a driver raises come out as the `OSError` that `Storage` promises."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        msg = f"{what}: {type(error).__name__}: {error}"
        raise OSError(errno.EIO, msg) from error


@contextlib.contextmanager
def as_native_errors() -> Iterator[None]:
    """Let an `OSError` of a driver's own come out as the subclass of its number, such as `FileNotFoundError`."""
    try:
        yield
    except OSError as error:
        native = OSError(error.errno, str(error)) if error.errno else error
        if isinstance(error, type(native)):
            raise
        raise native from error
    except Exception as error:
        if type(error).__name__ == "ResourceNotFound":
            raise FileNotFoundError(errno.ENOENT, str(error)) from error
        raise


def is_refusal(error: BaseException) -> bool:
    """Return whether the server said that the name is taken, in whatever words its driver chose."""
    if isinstance(error, FileExistsError) or getattr(error, "errno", None) == errno.EEXIST:
        return True
    texts = f"{type(error).__name__} {error} {error.__cause__!r}".lower()
    return any(word in texts for word in _REFUSALS)


def rename(fs: Any, source: str, target: str) -> None:
    """Rename a file by the driver's own means: webdav4 makes a copy of what it could have moved."""
    if hasattr(fs, "client") and hasattr(fs.client, "move"):
        fs.client.move(source, target, overwrite=False)
    else:
        fs.mv(source, target)


def copy(fs: Any, source: str, target: str) -> None:
    """Let the server copy a file; raise `NotImplementedError` or whatever the driver does if it cannot."""
    own = vars(type(fs))
    if "copy" in own and "cp_file" not in own and "_cp_file" not in own:
        fs.copy(source, target)
    else:
        fs.cp_file(source, target)


SILENCE_S: Final = 60.0
"""Seconds that a request may go unanswered, for drivers that would wait for ever."""


def with_silence_bounded(protocol: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a driver, so that it notices a server that is gone without a word."""
    kind = fsspec.get_filesystem_class(protocol)
    # asyncssh asks now and then whether the server is there, and gives up after the third time.
    asks = {"keepalive_interval": SILENCE_S / 4} if kind.__module__.startswith("sshfs") else {}
    return {**asks, **options}


def bound_silence(fs: Any, seconds: float) -> None:
    """Let a request fail that is not answered for so long, where the session is paramiko's or one of ``requests``."""
    get_channel = getattr(getattr(fs, "ftp", None), "get_channel", None)
    if get_channel is not None:
        get_channel().settimeout(seconds)
    session: Any = getattr(fs, "session", None)
    if type(session).__module__.startswith("requests."):
        session.request = functools.partial(session.request, timeout=seconds)


def disconnect(fs: Any) -> None:
    """Close a driver's session, where it has one that would stay open."""
    client: Any = getattr(fs, "client", None)
    session: Any = getattr(client, "http", client)
    with contextlib.suppress(Exception):
        session.close()


def escaped(path: str, unsafe: str) -> str:
    """Return a path in which each character that a server or its driver cannot take is written as ``^`` and its code.

    Example:
        >>> escaped("which?.ckpt", "?")
        'which^3F.ckpt'
        >>> unescaped("which^3F.ckpt", "?")
        'which?.ckpt'
    """
    if not unsafe:
        return path
    return "".join(f"^{ord(char):02X}" if char in unsafe or char == "^" else char for char in path)


def unescaped(path: str, unsafe: str) -> str:
    """Return the path that `escaped` was given."""
    if not unsafe:
        return path
    return re.sub(r"\^([0-9A-F]{2})", lambda match: chr(int(match[1], 16)), path)


def modified_s(info: Mapping[str, Any]) -> float | None:
    """Return when a file was last written, in seconds since the epoch, if the driver says so in any way."""
    for key in _TIMES:
        value = info.get(key)
        if isinstance(value, datetime.datetime):
            return value.timestamp()
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                return datetime.datetime.fromisoformat(value.replace("Z", "+00:00")).timestamp()
    for key in _MILLISECONDS:
        value = info.get(key)
        if isinstance(value, (int, float)):
            return float(value) / 1000
    return None


def stat_of(info: Mapping[str, Any], *, has_tags: bool) -> Stat:
    """Return size and version of a file from what the driver says of it; ``has_tags`` if its tags can be trusted."""
    size = int(info.get("size") or 0)
    for key in _VERSIONS if has_tags else ():
        if info.get(key):
            return Stat(size, str(info[key]))
    modified = modified_s(info)
    if modified is None:
        return Stat(size, "")
    return Stat(size, f"{modified:.6f}", modified_s=modified if modified.is_integer() else None)


def without_password(url: str) -> str:
    """Return a URL as it may be shown.

    Example:
        >>> without_password("sftp://me:secret@host/runs")
        'sftp://host/runs'
    """
    return re.sub(r"(?<=://)[^/]*@", "", url)
