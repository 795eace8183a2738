"""Values of an object that its ``state_dict()`` leaves out: a resume begins with their first values again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Final

import attrs
import torch
from torch import nn

from checkpointer._display import some_of
from checkpointer.errors import warn
from checkpointer_torch.foreign_loaders import is_stateful
from checkpointer_torch.prepared import unwrapped

_SAVES: Final = 8
"""Saves of a process at which the values are compared: what a training changes has changed by then."""
_FLAGS: Final = ("training", "initialized")
"""Modes that a program or the first step sets again."""


@attrs.frozen
class _Value:
    """An attribute of an object, and what it was when the training began."""

    name: str
    holder: Any
    attribute: str
    first: Any
    version: int = -1
    """How often a tensor had been written in place."""

    @property
    def now(self) -> Any:
        now = vars(self.holder).get(self.attribute)
        # A number that is multiplied by a tensor becomes one.
        one = isinstance(now, torch.Tensor) and now.numel() == 1 and not (now.requires_grad or now.is_meta)
        return now.item() if one and _is_number(self.first) else now

    @property
    def has_changed(self) -> bool:
        now = self.now
        numbers = isinstance(now, (int, float)) and isinstance(self.first, (int, float))
        if type(now) is not type(self.first) and not numbers:  # A cache that was made anew, or is gone.
            return False
        if isinstance(now, torch.Tensor):
            is_alike = now.shape == self.first.shape and not now.requires_grad
            return is_alike and (now is not self.first or _version(now) > self.version)
        return bool(now != self.first) and (now == now or self.first == self.first)  # NaN differs from itself.

    def is_saved(self, keys: Collection[str], leaves: Collection[Any]) -> bool:
        # A number may be saved under another name: one that is equal counts.
        return self.attribute in keys or (_is_number(self.now) and self.now in leaves)

    @property
    def how_to_give(self) -> str:
        return _how_to_give(self.name, self.attribute)

    def __str__(self) -> str:
        if isinstance(self.first, torch.Tensor):
            return f"{self.name} (a tensor, not a buffer)"
        return f"{self.name} ({self.first!r} -> {self.now!r})"


@attrs.frozen
class _ByParameter:
    """A dict with a tensor for each parameter, by its name and in its shape, as averages and importances are kept."""

    name: str
    holder: Any
    attribute: str
    shapes: Callable[[], Mapping[str, Collection[torch.Size]]]
    """Returns the shapes that parameters have by the ends of their names."""
    first: Mapping[str, tuple[int, int]]
    """The identity and the version of each tensor, when the training began."""

    @property
    def has_changed(self) -> bool:
        now = vars(self.holder).get(self.attribute)
        new = [
            (key, value.shape)
            for key, value in ([*now.items()] if isinstance(now, dict) else ())
            if isinstance(value, torch.Tensor) and self.first.get(key) != _identity(value)
        ]
        return any(shape in self.shapes().get(key, ()) for key, shape in new)

    def is_saved(self, keys: Collection[str], leaves: Collection[Any]) -> bool:
        return self.attribute in keys

    @property
    def how_to_give(self) -> str:
        return _how_to_give(self.name, self.attribute)

    def __str__(self) -> str:
        return f"{self.name} (a dict with tensors of the parameters)"


@attrs.frozen
class _InnerStates:
    """The states of an optimizer that another object holds, such as the base optimizer of a SAM."""

    name: str
    attribute: str
    optimizer: torch.optim.Optimizer
    how_to_give: str = ""

    @property
    def has_changed(self) -> bool:
        return bool(self.optimizer.state)

    def is_saved(self, keys: Collection[str], leaves: Collection[Any]) -> bool:
        return all(str(key) in keys for state in self.optimizer.state.values() for key in state)

    def __str__(self) -> str:
        return f"{self.name} (the states of an optimizer)"


_Watched = _Value | _ByParameter | _InnerStates


class OutsideState:
    """Watches the numbers, texts and tensors that objects have as attributes, at the first saves of a process.

    It also watches those of an object within that has a ``state_dict``, the states of an optimizer within, and dicts
    of any object within that hold a tensor for each parameter.
    Attributes of torch's own classes and those with a leading underscore are left out, and so is what was not there
    when the training began, such as the activations of the last batch.
    """

    def __init__(self, objects: Mapping[str, Any], saved: Collection[str]) -> None:
        self._objects = objects
        self._saved = saved
        """Names of all that is saved; a value of that name was given to the loop by itself."""
        self._values: dict[str, list[_Watched]] = {}
        self._saves = 0

    def begin(self) -> None:
        """Remember the values as the first ones."""
        given = {id(thing) for thing in self._objects.values()}
        every = {name: list(_values_of(name, thing, given)) for name, thing in self._objects.items()}
        self._values = {name: found for name, found in every.items() if found}

    def check(self, states: Mapping[str, Any]) -> None:
        """Warn once of each value that has changed and is not in the state of its object."""
        if self._saves >= _SAVES:
            return
        self._saves += 1
        lost = [
            value
            for name, values in self._values.items()
            for value in _lost(values, states.get(name))
            if value.attribute not in self._saved
        ]
        if not lost:
            return
        gone = set(map(id, lost))
        self._values = {name: [one for one in all_ if id(one) not in gone] for name, all_ in self._values.items()}
        msg = (
            f"the training has changed {some_of(list(map(str, lost)))}, and no state_dict() holds it: a resume begins "
            "with the first value again. If the training needs it, make it a buffer (register_buffer; persistent(True) "
            f"for a metric of torchmetrics), put it into the state_dict(){lost[0].how_to_give}"
        )
        warn(msg)


def _values_of(name: str, thing: Any, given: Collection[int]) -> Iterator[_Watched]:
    is_module = isinstance(thing, nn.Module)
    shapes = functools.cache(lambda: _shapes_by_ends(thing)) if is_module else dict
    for path, holder in thing.named_modules() if is_module else [("", thing)]:
        if type(holder).__module__.partition(".")[0] == "torch" or not hasattr(holder, "__dict__"):
            continue
        here = ".".join(filter(None, (name, path)))
        yield from _attributes(here, holder)
        yield from _dicts(here, holder, shapes)
        for attribute, inner in vars(holder).items():
            if attribute.startswith("_") or isinstance(inner, (nn.Module, type)) or id(unwrapped(inner)) in given:
                continue
            if isinstance(inner, torch.optim.Optimizer):
                yield _InnerStates(f"{here}.{attribute}", attribute, inner)
            elif hasattr(inner, "__dict__"):
                if is_stateful(inner):
                    yield from _attributes(f"{here}.{attribute}", inner)
                yield from _dicts(f"{here}.{attribute}", inner, shapes)


def _dicts(
    name: str, holder: Any, shapes: Callable[[], Mapping[str, Collection[torch.Size]]]
) -> Iterator[_ByParameter]:
    for attribute, value in [*vars(holder).items()]:  # Another thread may write to the object.
        if isinstance(value, dict) and not attribute.startswith("_"):
            first = {key: _identity(one) for key, one in [*value.items()] if isinstance(one, torch.Tensor)}
            yield _ByParameter(f"{name}.{attribute}", holder, attribute, shapes, first)


def _identity(tensor: torch.Tensor) -> tuple[int, int]:
    return id(tensor), _version(tensor)


def _version(tensor: torch.Tensor) -> int:
    """Return how often a tensor was written in place; 0 for one of ``inference_mode``, which does not count it."""
    return 0 if tensor.is_inference() else tensor._version


def _shapes_by_ends(module: nn.Module) -> dict[str, set[torch.Size]]:
    """Return the shapes by each end of a parameter's name, because a module within counts its names from itself."""
    shapes: dict[str, set[torch.Size]] = {}
    for name, parameter in module.named_parameters():
        parts = name.split(".")
        for start in range(len(parts) if not torch.nn.parameter.is_lazy(parameter) else 0):
            shapes.setdefault(".".join(parts[start:]), set()).add(parameter.shape)
    return shapes


def _how_to_give(name: str, attribute: str) -> str:
    return f", or pass {attribute}=lambda: {name} to the Loop and set {name} = loop[{attribute!r}] after resume()"


def _attributes(name: str, holder: Any) -> Iterator[_Value]:
    for attribute, value in vars(holder).items():
        if attribute.startswith("_") or attribute in _FLAGS:
            continue
        if isinstance(value, (bool, int, float, str)):
            yield _Value(f"{name}.{attribute}", holder, attribute, value)
        elif type(value) is torch.Tensor and not value.requires_grad:
            yield _Value(f"{name}.{attribute}", holder, attribute, value, _version(value))


def _lost(values: list[_Watched], state: Any) -> list[_Watched]:
    changed = [value for value in values if value.has_changed]
    if not changed:
        return []
    keys: set[str] = set()
    leaves: set[Any] = set()
    _collect(state, keys, leaves.add)
    return [value for value in changed if not value.is_saved(keys, leaves)]


def _collect(state: Any, keys: set[str], add: Callable[[Any], None]) -> None:
    """Collect the last parts of all keys, and all plain values."""
    if isinstance(state, Mapping):
        keys.update(str(key).rpartition(".")[2] for key in state)
        for value in state.values():
            _collect(value, keys, add)
    elif isinstance(state, (list, tuple)):
        for value in state:
            _collect(value, keys, add)
    elif _is_number(state):
        add(state)
    elif isinstance(state, torch.Tensor) and not state.dim() and state.device.type == "cpu":
        add(state.item())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, str)) and not isinstance(value, bool)
