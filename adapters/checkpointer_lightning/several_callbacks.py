"""What distinguishes the checkpoint callbacks of a Trainer: state keys, labels, aliases, and names in a directory."""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Iterable
from typing import Any, Final

import attrs

from checkpointer import Policy

CALLBACKS: Final[weakref.WeakValueDictionary[int, Any]] = weakref.WeakValueDictionary()
"""All callbacks that exist, by id, in the order they were made."""


def ours(callbacks: Iterable[Any]) -> list[Any]:
    """Return the callbacks of this package."""
    return [callback for callback in callbacks if hasattr(type(callback), "_base_key")]


def key_index(callback: Any, callbacks: Iterable[Any] | None = None) -> int:
    """Return how many earlier callbacks have the same base key.

    A Trainer asks for the key before its callbacks can be listed. Until then all callbacks that exist are counted.
    """
    everything = list(CALLBACKS.values()) if callbacks is None else callbacks
    earlier = itertools.takewhile(lambda other: other is not callback, ours(everything))
    return sum(other._base_key == callback._base_key for other in earlier)


def policy_and_label(callback: Any, trainer: Any) -> tuple[Policy, str]:
    """Return the policy and the label of a callback: in a directory each but the first has aliases of its own."""
    policy, folder = callback._make_policy(), callback._resolve_folder(trainer)
    same = [other for other in ours(trainer.callbacks) if other._resolve_folder(trainer) == folder]
    number = same.index(callback) if callback in same else 0
    if not number:
        return policy, ""
    naming = policy.name
    version = f"{naming.join}v{number}"
    naming = attrs.evolve(naming, last=naming.last + version, best=naming.best + version)
    return attrs.evolve(policy, name=naming), f"{number + 1}"


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
