"""The values of a training as parts: plain values, tensors, dicts and namespaces, and functions that return a value."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import attrs
import torch

from checkpointer.errors import PolicyError, warn
from checkpointer_torch.object_parts import Keys, Part, state_at
from checkpointer_torch.state_differences import Differences, compared
from checkpointer_torch.tensor_layouts import fitted

PLAIN: Final = (bool, int, float, complex, str, bytes, type(None))
"""Types of plain values."""
_ARRAY: Final = "numpy array"
"""Marks a numpy array that is saved as a tensor, because a safe load refuses arrays."""
_MANY: Final = 1000
"""A dict with more entries is data as a whole, and no entry of it is a setting."""
_DATA: Final = object()
"""Stands for a value that cannot be a setting."""
_OWN_REFERENCES: Final = 2
"""How many references there are while `HeldPart` counts them, if the program has none."""


@attrs.define
class ValuePart(Part):
    """A plain value, which the loop holds."""

    given: Any
    value: Any

    def take(self) -> Any:
        return self.value

    read = take

    def put(self, state: Any) -> None:
        self.value = state


class HeldPart(Part):
    """An object that is changed in place. A save warns if the program does not refer to it any more."""

    def __init__(self, name: str, thing: Any) -> None:
        self._name = name
        self._was_shared = False
        self._thing = thing

    def begin(self) -> None:
        """Remember whether the program has a reference to the object when the training begins."""
        self._was_shared = sys.getrefcount(self._thing) > _OWN_REFERENCES

    def check(self) -> None:
        """Warn if the program had a reference to the object, and does not have one any more."""
        if self._was_shared and sys.getrefcount(self._thing) <= _OWN_REFERENCES:
            name = self._name
            msg = (
                f"the Loop saves the object that it was given as {name!r}, but the program does not hold this object "
                "any more. If the program has assigned another object to the name, that one is not saved. Pass "
                f"{name}=lambda: {name}, and read loop[{name!r}] after resume()"
            )
            warn(msg)


class TensorPart(HeldPart):
    """A tensor, filled in place."""

    def take(self) -> Any:
        self.check()
        return self._thing.detach()

    def compare(self, state: Any) -> Differences:
        has_meta = any(torch.is_tensor(one) and one.is_meta for one in (self._thing, state))
        return compared({"value": self._thing}, {"value": state}, types=has_meta).all_or_nothing()

    @torch.no_grad()
    def put(self, state: Any) -> None:
        if not self.compare(state):
            self._thing.copy_(fitted(self._thing, state))

    def likes(self) -> Callable[[Keys], Any]:
        return functools.partial(state_at, self._thing)


class MutablePart(HeldPart):
    """A dict, a namespace or a dataclass, whose values the training may change in place.

    A value is a setting if the saving process never changed it, and another one is given now: the one given now
    holds. Every other value is put back.
    """

    def __init__(self, name: str, thing: Any) -> None:
        super().__init__(name, thing)
        self._is_dataclass = dataclasses.is_dataclass(thing) and not isinstance(thing, dict)
        if self._is_dataclass and thing.__dataclass_params__.frozen:
            msg = (
                f"{name} is a frozen {type(thing).__name__}, so a resume cannot set its fields; pass settings as "
                "config=, and values that the training changes in a dataclass that is not frozen"
            )
            raise PolicyError(msg)
        self._given = dict(_flat(self._values))

    @property
    def _values(self) -> Any:
        if self._is_dataclass:
            return {field.name: getattr(self._thing, field.name) for field in dataclasses.fields(self._thing)}
        return self._thing if isinstance(self._thing, dict) else vars(self._thing)

    def take(self) -> Any:
        self.check()
        return copy.deepcopy(self._values)

    def compare(self, state: Any) -> Differences:
        return Differences() if isinstance(state, Mapping) else Differences(missing=("*",))

    def put(self, state: Any) -> None:
        values, saved = self._values, copy.deepcopy(state)
        if self._is_dataclass:
            for name in filter(saved.__contains__, values):
                setattr(self._thing, name, saved[name])
        else:
            values.clear()
            values.update(saved)

    def untouched(self) -> dict[str, list[Keys]]:
        """Return the paths of values that are as they were given, and of those that are gone."""
        now = dict(_flat(self._values))
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

        return merged(state, self._values, ()), changes


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


class FunctionPart(Part):
    """A value that the program binds anew, so that a resume cannot fill an object in place.

    `read` returns the restored value until the next save, and otherwise calls the function.
    """

    def __init__(self, name: str, function: Callable[[], Any]) -> None:
        try:
            inspect.signature(function).bind()
        except TypeError as error:
            msg = f"{name} is a function that needs arguments ({error}); pass one without, such as lambda: value"
            raise PolicyError(msg) from error
        except ValueError:  # A builtin may have no signature.
            pass
        self._name = name
        self._function = function
        self._restored: list[Any] = []
        """The value that a resume has put back, until the next save."""
        self._is_read = True

    def read(self) -> Any:
        self._is_read = True
        return self._restored[0] if self._restored else self._function()

    def take(self) -> Any:
        if not self._is_read:
            msg = (
                f"resume() restored {self._name!r}, but the program has not read it and went on with another value. "
                f"This is not exact. Read loop[{self._name!r}] after resume()"
            )
            warn(msg)
        self._restored, self._is_read = [], True
        return _encoded(self._function())

    def put(self, state: Any) -> None:
        self._restored, self._is_read = [_decoded(state)], False


def _encoded(value: Any) -> Any:
    """Return the value as a safe load takes it: arrays as tensors, tensors without their graph."""
    if isinstance(value, torch.Tensor):
        return value.detach() if value.grad_fn is not None else value
    numpy = sys.modules.get("numpy")  # A program without numpy does not import it here.
    if numpy and isinstance(value, (numpy.ndarray, numpy.generic)) and value.dtype.kind in "biufc":
        return {_ARRAY: torch.from_numpy(value.copy())} if value.ndim else value.item()
    return _mapped(value, _encoded)


def _decoded(value: Any) -> Any:
    if isinstance(value, Mapping) and set(value) == {_ARRAY}:
        return value[_ARRAY].numpy()
    return _mapped(value, _decoded)


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    if type(value) is dict:
        return {key: function(item) for key, item in value.items()}
    return type(value)(map(function, value)) if type(value) in (list, tuple) else value
