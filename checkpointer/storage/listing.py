"""Lists what is on a filesystem that fsspec reaches: all of it, or an error."""

from __future__ import annotations

from typing import Any, Final

from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem

from checkpointer.storage.drivers import as_native_errors
from checkpointer.storage.retry import is_transient

__all__ = ["files_below", "is_link"]

_ATTEMPTS: Final = 5


def files_below(fs: Any, path: str) -> dict[str, Any]:
    """Return what the driver says of every file at or below ``path``, by name; raise if a part cannot be listed.

    fsspec's own `find` leaves out what it cannot list, as if it were empty: after a cut connection, everything.
    """
    if not _walks(fs):
        found = fs.find(path, detail=True)
        # For a single file some of them find a name without its details, or only a list of names.
        details = found if isinstance(found, dict) else dict.fromkeys(found)
        return {name: info or fs.info(name) for name, info in details.items()}
    files: dict[str, Any] = {}
    folders = [path]
    while folders:
        folder = folders.pop()
        for info in _ls(fs, folder):
            name = info["name"].rstrip("/")
            if info["type"] != "directory":
                files[name] = info
            elif name.strip("/") != folder.strip("/"):
                folders.append(name)
    return files


def is_link(fs: Any, folder: str) -> bool:
    """Return whether what can be listed as a folder is a link to one, which drivers follow."""
    if not _walks(fs):
        return False
    parent, _, last = folder.rpartition("/")
    # In the listing of the folder above it is what it is.
    found = (info for info in _ls(fs, parent or "/") if info["name"].rstrip("/").rpartition("/")[2] == last)
    return any(info["type"] != "directory" for info in found)


def _walks(fs: Any) -> bool:
    if isinstance(fs, AsyncFileSystem):
        return type(fs)._find is AsyncFileSystem._find
    return type(fs).find is AbstractFileSystem.find


def _ls(fs: Any, path: str) -> list[dict[str, Any]]:
    """Return what is in a folder; of a file itself; nothing if neither is there."""
    failure: Exception | None = None
    for _ in range(_ATTEMPTS):
        try:
            with as_native_errors():
                if listing := fs.ls(path, detail=True):
                    return list(listing)
            failure = None
        except Exception as error:
            if is_transient(error):
                raise
            failure = error
        # Drivers differ in what they say of a file.
        try:
            with as_native_errors():
                info = fs.info(path)
        except (FileNotFoundError, NotADirectoryError):
            return []
        if info["type"] != "directory":
            return [info]
        if failure is None:
            return []
        # Some ask after each file in it, and one of them is gone by then: that passes.
    assert failure is not None, "else it has returned"
    raise failure
