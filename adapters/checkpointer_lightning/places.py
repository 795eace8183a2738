"""Paths and URLs of a directory: a callback shows whole ones, records have names relative to it."""

from __future__ import annotations

import os

__all__ = ["is_local", "name_in"]


def is_local(folder: str) -> bool:
    """Return whether a folder is one of this machine's."""
    protocol, separator, _ = folder.partition("://")
    return not separator or protocol in ("file", "local")


def name_in(folder: str, path: str | os.PathLike[str]) -> str:
    """Return what a path is called in a folder, with ``/`` between parts; it begins with ``..`` if it is not in it."""
    path = os.fspath(path)
    if not is_local(folder):
        prefix = folder.rstrip("/") + "/"
        return path[len(prefix) :] if path.startswith(prefix) else f"../{path}"
    parent, name = os.path.split(os.path.abspath(path))
    found = os.path.relpath(os.path.join(os.path.realpath(parent), name), os.path.realpath(folder))
    return found.replace(os.sep, "/")
