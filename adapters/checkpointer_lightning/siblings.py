"""Several checkpoint callbacks in one Trainer: what tells each from the others, now and after a restart."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, Final

import attrs

from checkpointer import Policy

__all__ = ["apart", "guess_place", "introduce", "label", "newest", "place"]

_LIVING: Final[weakref.WeakValueDictionary[int, Any]] = weakref.WeakValueDictionary()
"""Every callback there is, in the order they were made."""


def introduce(callback: Any) -> None:
    """Take note of a new callback."""
    _LIVING[max(_LIVING, default=0) + 1] = callback


def guess_place(callback: Any, key: str) -> int:
    """Return how many callbacks of that key were made before; a Trainer asks before anyone can see its callbacks."""
    return place(callback, key, [_LIVING[number] for number in sorted(_LIVING)])


def place(callback: Any, key: str, callbacks: Iterable[Any]) -> int:
    """Return how many callbacks of that key come before this one."""
    before = 0
    for other in callbacks:
        if other is callback:
            break
        before += getattr(other, "_base_key", None) == key
    return before


def newest(callbacks: Iterable[Any], kind: type) -> Any:
    """Return the last callback of that kind in a Trainer, or None."""
    return next((callback for callback in reversed([*callbacks]) if isinstance(callback, kind)), None)


def label(number: int) -> str:
    """Return the label of the callback that comes ``number`` places after the first in a directory."""
    return f"{number + 1}" if number else ""


def apart(policy: Policy, number: int) -> Policy:
    """Return the policy of that callback, with aliases of its own."""
    if not number:
        return policy
    naming = policy.name
    version = f"{naming.join}v{number}"
    return attrs.evolve(policy, name=attrs.evolve(naming, last=naming.last + version, best=naming.best + version))
