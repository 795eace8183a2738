"""The objects of a training by name: their states are taken, compared and put back together."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from typing import Any

from checkpointer.errors import MismatchError, UnknownValueError
from checkpointer_torch.loader_view import torch_loader
from checkpointer_torch.program_values import FunctionPart, MutablePart
from checkpointer_torch.state_differences import Differences
from checkpointer_torch.stateful_objects import (
    ModulePart,
    OptimizerPart,
    Part,
    TensorPart,
    part_of,
    summary_of,
)

__all__ = ["TrainingObjects"]


class TrainingObjects:
    """The objects that a `Loop` was given, by name; ``objects[name]`` is a plain value or a function's value."""

    def __init__(self, objects: Mapping[str, Any]) -> None:
        self.shared: dict[str, Part] = {}
        """Parts that are saved once for all processes."""
        self.own: dict[str, Part] = {}
        """Parts that are saved for each process: loaders and functions."""
        self._values: dict[str, Any] = {}
        summaries = []
        for name, thing in objects.items():
            part = part_of(name, thing, self._values)
            is_own = torch_loader(thing) is not None or isinstance(part, FunctionPart)
            (self.own if is_own else self.shared)[name] = part
            summaries.append(summary_of(thing, name, part))
        self._given = dict(self._values)
        self.summaries = tuple(summaries)
        self.names = (*self.shared, *self.own)
        self.modules = {name: part.module for name, part in self.shared.items() if isinstance(part, ModulePart)}

    def begin(self) -> None:
        """Remember which objects the program has a reference to."""
        for part in self.shared.values():
            if isinstance(part, (TensorPart, MutablePart)):
                part.held.begin()

    def __getitem__(self, name: str) -> Any:
        if name in self._values:
            return self._values[name]
        part = self.own.get(name)
        if not isinstance(part, FunctionPart):
            raise UnknownValueError(self._no_value(name))
        return part.read()

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self._values:  # Only what was given is saved: a new name would be lost.
            raise UnknownValueError(self._no_value(name))
        self._values[name] = value

    def _no_value(self, name: str) -> str:
        if name in self.names:
            return (
                f"loop[{name!r}] cannot be read or bound anew: {name!r} is an object of the program, and the loop "
                f"holds plain values alone. Change the object in place, or pass {name}=lambda: {name} to the Loop"
            )
        have = ", ".join(self._values) or "none"
        return f"the loop holds no value {name!r} (have: {have}); pass {name}=... to the Loop, so that it is saved"

    def unchanged(self) -> dict[str, Any]:
        """Return the values that are as they were given: those within objects, and the plain ones."""
        mutable = {name: part for name, part in self.shared.items() if isinstance(part, MutablePart)}
        return {
            "untouched": {name: part.untouched() for name, part in mutable.items()},
            "unchanged": [name for name, value in self._given.items() if value == self._values[name]],
        }

    def compare(self, states: Mapping[str, Any]) -> Differences:
        """Return how saved states differ from the states that `put` can take."""
        differences = Differences(
            missing=tuple(name for name in self.names if name not in states),
            unexpected=tuple(sorted(set(states) - set(self.names))),
        )
        for name, part in self.shared.items():
            if name in states:
                differences += part.compare(states[name]).within(name)
        return differences

    def settle(
        self, states: Mapping[str, Any], unchanged: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
        """Replace settings among the saved states by those that are given now.

        Returns:
            The shared states; the changed settings, each with the difference; and the plain values given now that the
            saved ones replace.
        """
        settled = {name: states[name] for name in self.shared if name in states}
        changes: dict[str, str] = {}
        for name, untouched in unchanged.get("untouched", {}).items():
            part = self.shared.get(name)
            if isinstance(part, MutablePart) and name in states:
                settled[name], changed = part.settled(states[name], untouched)
                changes |= {f"{name}.{key}": change for key, change in changed.items()}
        plain = [name for name in unchanged.get("unchanged", ()) if name in self._given and name in states]
        replaced = {name: self._given[name] for name in plain if self._given[name] != states[name]}
        return settled, changes, replaced

    def put(self, states: Mapping[str, Any]) -> None:
        """Put the shared states back.

        Parts that may refuse their state come first: their earlier states are small enough to keep for going back.
        """
        large = (ModulePart, OptimizerPart)
        done = []
        for name in sorted(states, key=lambda name: isinstance(self.shared[name], large)):
            part = self.shared[name]
            if not isinstance(part, large):
                done.append((part, copy.deepcopy(part.take())))
            try:
                part.put(states[name])
            except Exception as error:
                for earlier, before in done:
                    with contextlib.suppress(Exception):  # It may be the very part that refuses.
                        earlier.put(before)
                msg = f"{name} refuses its state ({type(error).__name__}: {error}); nothing was loaded"
                raise MismatchError(msg) from error
