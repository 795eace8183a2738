"""Folders that this process may not read, such as ``lost+found`` at the root of a mount: foreign, not an error."""

from __future__ import annotations

from typing import Final

from checkpointer.ports import Stat

UNREADABLE: Final = Stat(0, "")
"""Stands in a listing for a folder or file that this process may not read. So its name counts as taken."""
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
