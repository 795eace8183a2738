"""Makes a state of what a pickle says: plain data and tensors as they are, and a mark in place of any other object."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import attrs

from checkpointer._validation import brief
from checkpointer.formats.inspection.pickle import Call, Global, Persistent, Size
from checkpointer.formats.inspection.pickled_tensors import Stored
from checkpointer.formats.inspection.pickled_values import is_module, module_entries, versions_of
from checkpointer.formats.inspection.tensors import dtype_named
from checkpointer.formats.inspection.work_limit import ENTRY, Work

_SHOWN: Final = 200
"""Characters of a key that a message shows."""


@attrs.frozen(eq=False, repr=False)
class Unread:
    """Stands for an object that only unpickling would make."""

    what: str
    """The class or function that would make it, such as ``"argparse.Namespace"``."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        msg = f"{self.what} was not unpickled, so it has no {name!r}; if you trust the file pass weights_only=False"
        raise AttributeError(msg)

    def __repr__(self) -> str:
        return f"<{self.what}, not unpickled>"


def unread_in(value: Any) -> Iterator[tuple[str, Unread]]:
    """Yield each mark in a state, with the keys that lead to it."""
    seen: set[int] = set()
    todo = [("", value)]
    while todo:
        path, found = todo.pop()
        if isinstance(found, Unread):
            yield path, found
        elif isinstance(found, (Mapping, list, tuple, set, frozenset)) and id(found) not in seen:
            seen.add(id(found))
            pairs = [*(found.items() if isinstance(found, Mapping) else enumerate(found))]
            keys = [("(a key)", key) for key, _ in pairs if isinstance(key, (Unread, tuple))]
            named = ((key[:_SHOWN] if isinstance(key, str) else brief(key), item) for key, item in (*pairs, *keys))
            todo += [(f"{path}.{key}" if path else key, item) for key, item in named]


@attrs.frozen
class Rebuilding:
    """Makes the state that a pickle holds. A pickled module becomes its ``state_dict``.

    Each object is made once, so that what is there twice is one object again, and what holds itself ends.
    """

    tensor: Callable[[Stored], Any]
    """Makes a tensor."""
    work: Work
    """Bounds what is made."""
    _made: dict[int, Any] = attrs.field(factory=dict, init=False)

    def make(self, value: Any) -> Any:
        """Return what a value of the pickle stands for."""
        if isinstance(value, Global):
            return (dtype_named(value.name) if value.module == "torch" else None) or Unread(str(value))
        if isinstance(value, Persistent):
            return Unread("a storage")
        if not isinstance(value, (dict, list, tuple, set, frozenset, Call)):
            return value
        if id(value) not in self._made:
            made = self._container(value)
            self._made[id(value)] = made
        return self._made[id(value)]

    def _container(self, value: Any) -> Any:
        if isinstance(value, Call):
            return self._call(value)
        if isinstance(value, Size):
            return _torch("Size")(map(self.make, value))
        if not isinstance(value, (dict, list)):
            return type(value)(map(self.make, value))
        made: Any = type(value)()
        self._made[id(value)] = made
        if isinstance(value, list):
            made.extend(map(self.make, value))
            return made
        for key, child in value.items():
            made[self.make(key)] = self.make(child)
        if versions := versions_of(value, self.work):
            made._metadata = versions
        return made

    def _call(self, call: Call) -> Any:
        if (stored := Stored.of(call)) is not None:
            return self.tensor(stored)
        if is_module(call):
            return OrderedDict(self._state_of(call))
        if call.what == Global("torch", "device"):
            return _torch("device")(*call.args)
        return Unread(str(call.what) if isinstance(call.what, Global) else "an object")

    def _state_of(self, module: Call, prefix: str = "") -> Iterator[tuple[str, Any]]:
        for key, child, is_weight in module_entries(module):
            self.work.spend(ENTRY + len(prefix) + len(key))
            if is_weight and is_module(child):
                yield from self._state_of(child, f"{prefix}{key}.")
            elif is_weight:
                yield f"{prefix}{key}", self.make(child)


def _torch(name: str) -> Any:
    import torch

    return getattr(torch, name, None)
