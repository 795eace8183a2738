"""One interface to fsspec's drivers, which differ in errors, times, versions, listings, renames and timeouts."""

from __future__ import annotations

import contextlib
import datetime
import errno
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import fsspec
from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem
from fsspec.core import url_to_fs

from checkpointer.ports import Stat
from checkpointer.storage.retry import is_transient

_REFUSALS: Final = ("precondition", "pre-condition", "already exists", "alreadyexists")
_TIMES: Final = ("LastModified", "last_modified", "mtime", "modified", "updated", "last_write_time", "created")
_MILLISECONDS: Final = ("modificationTime", "modification_time")
_VERSIONS: Final = ("ETag", "etag", "generation", "md5Hash")
_LIST_ATTEMPTS: Final = 5
SILENCE_S: Final = 60.0
"""Seconds that a request may stay unanswered, for drivers without a timeout of their own."""


@contextlib.contextmanager
def as_os_errors(what: str) -> Iterator[None]:
    """Raise any exception of a driver as the `OSError` that `Storage` promises."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        msg = f"{what}: {type(error).__name__}: {error}"
        raise OSError(errno.EIO, msg) from error


@contextlib.contextmanager
def as_native_errors() -> Iterator[None]:
    """Raise a driver's own `OSError` as the subclass for its number, such as `FileNotFoundError`."""
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
    """Return whether the error means that the name is taken. Drivers report that in different ways."""
    if isinstance(error, FileExistsError) or getattr(error, "errno", None) == errno.EEXIST:
        return True
    texts = f"{type(error).__name__} {error} {error.__cause__!r}".lower()
    return any(text in texts for text in _REFUSALS)


def connect(url: str, options: Mapping[str, Any], deadline_s: float) -> tuple[Any, str]:
    """Return a new filesystem for the URL, and the URL's path in it.

    A request that is not answered within ``deadline_s`` or a minute fails, also in drivers that would wait forever:
    asyncssh's, paramiko's, and those that use ``requests``. If ``deadline_s`` is 0, it is a minute.
    """
    kind = fsspec.get_filesystem_class(url.partition("://")[0])
    # asyncssh polls the server in this interval, and gives up after the third time.
    polls = {"keepalive_interval": SILENCE_S / 4} if kind.__module__.startswith("sshfs") else {}
    fs, root = url_to_fs(url, skip_instance_cache=True, **polls | dict(options))
    # A deadline of 0 allows one attempt, which may take a minute.
    limit_s = min(SILENCE_S, deadline_s or SILENCE_S)
    get_channel = getattr(getattr(fs, "ftp", None), "get_channel", None)
    if get_channel is not None:
        get_channel().settimeout(limit_s)
    session: Any = getattr(fs, "session", None)
    if type(session).__module__.startswith("requests."):
        session.request = functools.partial(session.request, timeout=limit_s)
    return fs, root.rstrip("/")


def rename(fs: Any, source: str, target: str) -> None:
    """Rename a file. For webdav4 this uses its client, because its filesystem would copy the file."""
    if hasattr(fs, "client") and hasattr(fs.client, "move"):
        fs.client.move(source, target, overwrite=False)
    else:
        fs.mv(source, target)


def has_rename_new(fs: Any) -> bool:
    """Return whether the driver has a request of its own for a rename to a new name."""
    return hasattr(getattr(fs, "ftp", None), "posix_rename")


def rename_new(fs: Any, source: str, target: str) -> None:
    """Rename a file with paramiko's plain request: OpenSSH refuses it if the target exists, by a hard link.

    The driver's own rename replaces the target.
    """
    try:
        fs.ftp.rename(source, target)
    except OSError as error:
        # The protocol has no number for this error.
        if error.errno is None and fs.exists(target):
            raise FileExistsError(errno.EEXIST, str(error), target) from error
        raise


def copy(fs: Any, source: str, target: str) -> None:
    """Let the server copy a file. If it cannot, `NotImplementedError` or a driver's own exception is raised."""
    own = vars(type(fs))
    if "copy" in own and "cp_file" not in own and "_cp_file" not in own:
        fs.copy(source, target)
    else:
        fs.cp_file(source, target)


def files_below(fs: Any, path: str, is_needed: Callable[[str], bool]) -> dict[str, Any]:
    """Return the driver's details of every file at or below ``path``, by name; raise if a folder cannot be listed.

    fsspec's own `find` leaves out a folder that it cannot list. After a cut connection that is every folder. A folder
    without permission that is not needed is listed instead of its files.
    """
    if not _walks(fs):
        found = fs.find(path, detail=True)
        # For a single file some drivers find a name without its details, or only a list of names.
        details = found if isinstance(found, dict) else dict.fromkeys(found)
        return {name: info or fs.info(name) for name, info in details.items()}
    files: dict[str, Any] = {}
    folders = [path]
    while folders:
        folder = folders.pop()
        try:
            listing = _ls(fs, folder)
        except PermissionError:
            if folder == path or is_needed(folder):
                raise
            files[folder] = {"size": 0}
            continue
        for info in listing:
            name = info["name"].rstrip("/")
            if info["type"] != "directory":
                files[name] = info
            elif name.strip("/") != folder.strip("/"):
                folders.append(name)
    return files


def is_link(fs: Any, folder: str) -> bool:
    """Return whether a path that can be listed as a folder is a link to a folder. Drivers follow such links."""
    if not _walks(fs):
        return False
    parent, _, last = folder.rpartition("/")
    # The listing of the folder above shows the link itself.
    found = (info for info in _ls(fs, parent or "/") if info["name"].rstrip("/").rpartition("/")[2] == last)
    return any(info["type"] != "directory" for info in found)


def _walks(fs: Any) -> bool:
    if isinstance(fs, AsyncFileSystem):
        return type(fs)._find is AsyncFileSystem._find
    return type(fs).find is AbstractFileSystem.find


def _ls(fs: Any, path: str) -> list[dict[str, Any]]:
    """Return the entries of a folder, or a file as its own only entry; empty if neither exists."""
    failure: Exception | None = None
    for _ in range(_LIST_ATTEMPTS):
        try:
            with as_native_errors():
                if listing := fs.ls(path, detail=True):
                    return list(listing)
            failure = None
        except Exception as error:
            if is_transient(error) or isinstance(error, PermissionError):
                raise
            failure = error
        # Drivers differ in their answer for a file.
        try:
            with as_native_errors():
                info = fs.info(path)
        except (FileNotFoundError, NotADirectoryError):
            return []
        if info["type"] != "directory":
            return [info]
        if failure is None:
            return []
        # Some drivers request the details of each entry, and fail if one was deleted meanwhile: so try again.
    assert failure is not None, "else it has returned"
    raise failure


def modified_s(info: Mapping[str, Any]) -> float | None:
    """Return when a file was last written, in seconds since the epoch; None if the driver has no such value."""
    for key in _TIMES:
        value = info.get(key)
        if isinstance(value, datetime.datetime):
            return value.timestamp()
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                return datetime.datetime.fromisoformat(value.replace("Z", "+00:00")).timestamp()
    return next((float(info[key]) / 1000 for key in _MILLISECONDS if isinstance(info.get(key), (int, float))), None)


def stat_of(info: Mapping[str, Any], *, has_tags: bool) -> Stat:
    """Return size and version of a file from the driver's details. ``has_tags``: its tags change with the content."""
    size = int(info.get("size") or 0)
    for key in _VERSIONS if has_tags else ():
        if info.get(key):
            # Some versions of adlfs quote an ETag in a listing and not elsewhere.
            return Stat(size, str(info[key]).strip('"'))
    modified = modified_s(info)
    if modified is None:
        return Stat(size, "")
    return Stat(size, f"{modified:.6f}", modified_s=modified if modified.is_integer() else None)


def escaped(path: str, unsafe: str) -> str:
    """Return a path in which each character that the server or its driver misreads is written as ``^`` and its code."""
    if not unsafe:
        return path
    return "".join(f"^{ord(char):02X}" if char in unsafe or char == "^" else char for char in path)


def unescaped(path: str, unsafe: str) -> str:
    """Return the path that was passed to `escaped`."""
    return re.sub(r"\^([0-9A-F]{2})", lambda match: chr(int(match[1], 16)), path) if unsafe else path
