"""What to do when a place cannot be used: for a local path who owns it, its mode, and the cure."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from checkpointer.ports import Storage, SupportsPaths

__all__ = ["access_advice", "permission_advice"]


def access_advice(storage: Storage, error: OSError) -> str:
    """Return what to check when a storage raised ``error``.

    Example:
        >>> from checkpointer.storage import MemoryStorage
        >>> from checkpointer.storage.access import access_advice
        >>> access_advice(MemoryStorage(), ConnectionError())
        'check the path or URL, the credentials and the network'
    """
    if not isinstance(storage, SupportsPaths):
        return "check the path or URL, the credentials and the network"
    if error.errno == errno.EACCES:  # EPERM is for what no mode allows, such as a rename on some mounts.
        return permission_advice(error.filename or storage.local_path(""))
    return "check the path and the disk or mount that it is on"


def permission_advice(path: str | os.PathLike[str]) -> str:
    """Return who owns a path that this process may not use, its mode, and the cure."""
    for place in (Path(path), *Path(path).parents):
        try:
            info = place.stat()
        except OSError:  # It does not exist, or a folder above it is closed: that folder is the one to open.
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
