"""What fsspec's drivers say, in one language: errors, times and versions, which each of them words differently."""

from __future__ import annotations

import contextlib
import datetime
import errno
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from checkpointer.ports import Stat

__all__ = ["as_os_errors", "is_refusal", "modified_s", "stat_of", "without_password"]

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


def is_refusal(error: BaseException) -> bool:
    """Return whether the server said that the name is taken, in whatever words its driver chose."""
    if isinstance(error, FileExistsError) or getattr(error, "errno", None) == errno.EEXIST:
        return True
    texts = f"{type(error).__name__} {error} {error.__cause__!r}".lower()
    return any(word in texts for word in _REFUSALS)


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


def stat_of(info: Mapping[str, Any]) -> Stat:
    """Return size and version of a file from what the driver says of it."""
    size = int(info.get("size") or 0)
    for key in _VERSIONS:
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
    return re.sub(r"(?<=://)[^/@]*@", "", url)
