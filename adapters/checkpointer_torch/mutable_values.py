"""Objects that a training changes in place: tensors, dicts, namespaces and dataclasses."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from checkpointer import CheckpointerWarning
from checkpointer_torch.state_differences import Differences

__all__ = ["PLAIN", "Held", "MutablePart"]

PLAIN: Final = (bool, int, float, complex, str, bytes, type(None))
"""Types of plain values."""
_MANY: Final = 1000
"""A dict with more entries is data as a whole, and no entry of it is a setting."""
_DATA: Final = object()
"""Stands for a value that cannot be a setting."""
_OWN_REFERENCES: Final = 2
"""How many references there are while `Held` counts them, if the program has none."""

Keys = tuple[Any, ...]


class Held:
    """An object under its name. If the program binds the name to another object, the loop has the last reference."""

    __slots__ = ("_name", "_was_shared", "thing")

    def __init__(self, name: str, thing: Any) -> None:
        self._name = name
        self._was_shared = False
        self.thing = thing

    def begin(self) -> None:
        """Remember whether the program has a reference when the training begins."""
        self._was_shared = sys.getrefcount(self.thing) > _OWN_REFERENCES

    def check(self) -> None:
        """Warn if the program had a reference, and does not have one any more."""
        if self._was_shared and sys.getrefcount(self.thing) <= _OWN_REFERENCES:
            name = self._name
            msg = (
                f"{name!r} is saved as the object that was given to the Loop, and the program has no reference to that "
                f"object any more: if it has bound the name to another one, that one is not saved. Pass "
                f"{name}=lambda: {name}, and read loop[{name!r}] after resume()"
            )
            warnings.warn(msg, CheckpointerWarning, stacklevel=2)


class MutablePart:
    """Named values that the training may change in place.

    A value is a setting if the saving process never changed it, and another one is given now: the one given now
    holds. Every other value is put back.
    """

    def __init__(
        self, held: Held, read: Callable[[Any], dict[str, Any]], write: Callable[[Any, dict[str, Any]], object]
    ) -> None:
        self.held = held
        self._of = read
        self._write = write
        self._given = dict(_flat(self._read()))

    def _read(self) -> dict[str, Any]:
        return self._of(self.held.thing)

    def take(self) -> Any:
        """See `Part.take`."""
        self.held.check()
        return copy.deepcopy(self._read())

    def compare(self, state: Any) -> Differences:
        """See `Part.compare`."""
        return Differences() if isinstance(state, Mapping) else Differences(missing=("*",))

    def put(self, state: Any) -> None:
        """See `Part.put`."""
        self._write(self.held.thing, copy.deepcopy(state))

    def untouched(self) -> dict[str, list[Keys]]:
        """Return the paths of values that are as they were given, and of those that are gone."""
        now = dict(_flat(self._read()))
        return {
            "same": [path for path, value in self._given.items() if value is not _DATA and now.get(path) == value],
            "gone": [path for path in self._given if path not in now],
        }

    def settled(self, state: Mapping[str, Any], untouched: Mapping[str, Sequence[Keys]]) -> tuple[Any, dict[str, str]]:
        """Return the state with the settings that are given now, and how those differ from the saved ones, by name."""
        changes: dict[str, str] = {}
        same, gone = ({tuple(path) for path in untouched[kind]} for kind in ("same", "gone"))

        def merged(saved: Mapping[Any, Any], here: Mapping[Any, Any], before: Keys) -> dict[Any, Any]:
            result = dict(saved)
            if max(len(saved), len(here)) > _MANY:
                return result
            for key, value in here.items():
                path = (*before, key)
                given = self._given.get(path, _DATA)
                if key not in saved:
                    if path in self._given and path not in gone:
                        result[key] = value
                elif isinstance(value, dict) and isinstance(saved[key], dict):
                    result[key] = merged(saved[key], value, path)
                elif path in same and given is not _DATA and given != saved[key]:
                    result[key] = given
                    changes[".".join(map(str, path))] = f"{given!r} here, {saved[key]!r} there"
            return result

        return merged(state, self._read(), ()), changes


def _flat(values: Mapping[Any, Any], before: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Yield each path, with its value if that may be a setting."""
    if len(values) > _MANY:
        return
    for key, value in values.items():
        path = (*before, key)
        yield path, copy.copy(value) if _is_setting(value) else _DATA
        if isinstance(value, dict):
            yield from _flat(value, path)


def _is_setting(value: Any) -> bool:
    return isinstance(value, PLAIN) or (
        isinstance(value, (list, tuple)) and len(value) <= _MANY and all(isinstance(item, PLAIN) for item in value)
    )
