"""The differences between a state and the object that is to take it, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import attrs
import torch

from checkpointer._display import some_of
from checkpointer.formats.dtypes import holds

_SHOWN: Final = 10
"""Names of each kind that a message lists."""


@attrs.frozen
class Differences:
    """What does not fit."""

    missing: tuple[str, ...] = ()
    """Wanted, and not in the state."""
    unexpected: tuple[str, ...] = ()
    """In the state, and not wanted."""
    reshaped: Mapping[str, str] = attrs.field(factory=dict)
    """There and wanted, with another shape, or a type that cannot hold the numbers: both by name."""
    misplaced: Mapping[str, str] = attrs.field(factory=dict)
    """There and wanted, for another parameter: both by name."""
    untaken: tuple[str, ...] = ()
    """Objects that take nothing of their state if any of it does not fit."""

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.reshaped or self.misplaced)

    def plus(self, name: str, other: Differences) -> Differences:
        """Return these differences and others, which are below ``name``."""
        return Differences(
            (*self.missing, *(f"{name}.{key}" for key in other.missing)),
            (*self.unexpected, *(f"{name}.{key}" for key in other.unexpected)),
            {**self.reshaped, **{f"{name}.{key}": shapes for key, shapes in other.reshaped.items()}},
            {**self.misplaced, **{f"{name}.{key}": both for key, both in other.misplaced.items()}},
            (*self.untaken, *(f"{name}.{key}" if key else name for key in other.untaken)),
        )

    def all_or_nothing(self) -> Differences:
        """Return the same, for an object that takes nothing of its state if there is a difference."""
        return attrs.evolve(self, untaken=("",)) if self else self

    def __str__(self) -> str:
        reshaped = [f"{key} ({shapes})" for key, shapes in self.reshaped.items()]
        misplaced = [f"{key} ({both})" for key, both in self.misplaced.items()]
        kinds = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of another shape or type": reshaped,
            "of another parameter": misplaced,
        }
        return "; ".join(f"{kind}: {some_of(names, _SHOWN)}" for kind, names in kinds.items() if names)


def compared(wanted: Mapping[str, Any], state: Mapping[str, Any], *, types: bool = False) -> Differences:
    """Compare keys, and the shapes of tensors; with ``types`` also whether the wanted type can hold the numbers."""
    own_kind = "_extra_state"  # Its module decides what it takes.
    shaped = [key for key in wanted if key in state and not str(key).endswith(own_kind)]
    both = [(key, *_shapes(wanted[key], state[key], types=types)) for key in shaped]
    return Differences(
        missing=tuple(key for key in wanted if key not in state),
        unexpected=tuple(str(key) for key in state if key not in wanted),
        reshaped={key: f"here {here}, there {there}" for key, here, there in both if here != there and here},
    )


def are_alike(states: Iterable[Any]) -> bool:
    """Return whether all these states are the same."""
    first, *others = states
    return all(_is_same(first, other) for other in others)


def _is_same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_is_same(item, other[key]) for key, item in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return bool(one == other)


def _shapes(here: Any, there: Any, *, types: bool) -> tuple[str, str]:
    shapes = _shape(here), _shape(there)
    are_tensors = isinstance(here, torch.Tensor) and isinstance(there, torch.Tensor)
    if not (types and are_tensors):
        return shapes
    if shapes[0] and here.is_meta != there.is_meta:  # A copy from or to there copies nothing.
        on_meta = f"{shapes[0]} on the meta device", f"{shapes[1]} on the meta device"
        return (on_meta[0], shapes[1]) if here.is_meta else (shapes[0], on_meta[1])
    if shapes[0] == shapes[1] and not holds(here.dtype, there.dtype):
        return str(here.dtype), str(there.dtype)
    return shapes


def _shape(value: Any) -> str:
    """Return a tensor's shape as text; empty for a lazy one, which has none yet."""
    if not isinstance(value, torch.Tensor):
        return "no tensor"
    return "" if torch.nn.parameter.is_lazy(value) else str(list(value.shape))
