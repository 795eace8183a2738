"""What distinguishes the checkpoint callbacks of a Trainer: state keys, labels, aliases, and names in a directory."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable
from typing import Any, Final

import attrs

from checkpointer import Policy

__all__ = ["is_local", "key_index", "label", "name_in", "ours", "register", "with_own_aliases"]

_CALLBACKS: Final[weakref.WeakValueDictionary[int, Any]] = weakref.WeakValueDictionary()
"""All callbacks that exist, in the order they were made."""


def register(callback: Any) -> None:
    """Add a new callback."""
    _CALLBACKS[max(_CALLBACKS, default=0) + 1] = callback


def ours(callbacks: Iterable[Any]) -> list[Any]:
    """Return the callbacks of this package."""
    return [callback for callback in callbacks if hasattr(type(callback), "_base_key")]


def key_index(callback: Any, callbacks: Iterable[Any] | None = None) -> int:
    """Return how many earlier callbacks have the same base key.

    A Trainer asks for the key before its callbacks can be listed. Until then all callbacks that exist are counted.
    """
    everything = [_CALLBACKS[number] for number in sorted(_CALLBACKS)]
    before = 0
    for other in ours(everything if callbacks is None else callbacks):
        if other is callback:
            break
        before += other._base_key == callback._base_key
    return before


def label(number: int) -> str:
    """Return the label of the callback that comes ``number`` places after the first in a directory."""
    return f"{number + 1}" if number else ""


def with_own_aliases(policy: Policy, number: int) -> Policy:
    """Return the policy of that callback, with aliases of its own."""
    if not number:
        return policy
    naming = policy.name
    version = f"{naming.join}v{number}"
    return attrs.evolve(policy, name=attrs.evolve(naming, last=naming.last + version, best=naming.best + version))


def is_local(folder: str) -> bool:
    """Return whether a folder is on this machine's disks."""
    protocol, separator, _ = folder.partition("://")
    return not separator or protocol in ("file", "local")


def name_in(folder: str, path: str | os.PathLike[str]) -> str:
    """Return a path's name in a folder, with ``/`` between parts. It begins with ``..`` if the path is outside."""
    path = os.fspath(path)
    if not is_local(folder):
        prefix = folder.rstrip("/") + "/"
        return path[len(prefix) :] if path.startswith(prefix) else f"../{path}"
    parent, name = os.path.split(os.path.abspath(path))
    found = os.path.relpath(os.path.join(os.path.realpath(parent), name), os.path.realpath(folder))
    return found.replace(os.sep, "/")
