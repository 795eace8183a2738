"""Paths that this process may not read: how a listing shows them, and what to do if they are needed."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from checkpointer.ports import Stat

UNREADABLE: Final = Stat(0, "")
"""Stands in a listing for a folder or file that this process may not read, such as ``lost+found``: a foreign one."""
_HOME: Final = ".checkpointer"
_NEEDED: Final = frozenset({"records", "terms", "changes", "aliases", "writers", "replacing"})


def is_needed(folder: str, *, is_asked_for: bool = False) -> bool:
    """Return whether a listing without this folder could hide records, or what another process does.

    That holds for the root and this library's own folders; if a path is asked for, for all in ``.checkpointer``.

    Example:
        >>> is_needed(".checkpointer/records"), is_needed("lost+found")
        (True, False)
    """
    parts = folder.strip("/").split("/")
    if parts[0] != _HOME:
        return parts == [""]
    return is_asked_for or len(parts) == 1 or (len(parts) == 2 and parts[1] in _NEEDED)


def permission_advice(path: str | os.PathLike[str]) -> str:
    """Return who owns a path that this process may not use, its mode, and what to do."""
    for place in (Path(path), *Path(path).parents):
        try:
            info = place.stat()
        except OSError:  # It does not exist, or a folder above it denies access: then that folder is the cause.
            continue
        runs_as = f"this process runs as {_user(os.geteuid())}" if hasattr(os, "geteuid") else "this process may not"
        return (
            f"{place} belongs to {_user(info.st_uid)} with mode {stat.filemode(info.st_mode)}, and {runs_as}: run as "
            "the owner, change owner or mode (chown, chmod), or choose another directory"
        )
    return "check who owns the path, and its mode"


def _user(uid: int) -> str:
    try:
        import pwd

        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except (ImportError, KeyError):  # Windows, or a container without this user.
        return f"uid {uid}"
