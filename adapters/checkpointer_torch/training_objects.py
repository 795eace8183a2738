"""The objects of a training by name: their states are taken, compared and put back together."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from checkpointer.errors import MismatchError, PolicyError, UnknownValueError
from checkpointer.formats.pickler import HOW_TO_SAVE_SHARDS, is_dtensor, is_shard
from checkpointer_torch import object_parts as parts
from checkpointer_torch.foreign_loaders import is_stateful
from checkpointer_torch.loader_view import LoaderView
from checkpointer_torch.outside_state import OutsideState
from checkpointer_torch.parameter_names import Order, ParameterNames
from checkpointer_torch.prepared import check_scalers, unwrapped
from checkpointer_torch.random_state import accessors
from checkpointer_torch.state_differences import Differences
from checkpointer_torch.value_parts import PLAIN, FunctionPart, HeldPart, MutablePart, TensorPart, ValuePart


class TrainingObjects:
    """The objects that a `Loop` was given, by name; ``objects[name]`` is a plain value or a function's value."""

    def __init__(self, objects: Mapping[str, Any]) -> None:
        check_scalers(objects)
        all_parts = {name: _part_of(name, thing) for name, thing in objects.items()}
        own = (LoaderView, FunctionPart)
        self.own = {name: part for name, part in all_parts.items() if isinstance(part, own)}
        """Parts that are saved for each process: loaders and functions."""
        self.shared = {name: part for name, part in all_parts.items() if not isinstance(part, own)}
        """Parts that are saved once for all processes."""
        self.names = (*self.shared, *self.own)
        self.modules = {name: part.module for name, part in self.shared.items() if isinstance(part, parts.ModulePart)}
        optimizers = {name: part for name, part in self.shared.items() if isinstance(part, parts.OptimizerPart)}
        self._parameters = ParameterNames(self.modules, {name: part.optimizer for name, part in optimizers.items()})
        self.summaries = tuple(_summary_of(name, thing, all_parts[name]) for name, thing in objects.items())
        self._values = {name: part for name, part in self.shared.items() if isinstance(part, ValuePart)}
        stateful = (parts.ModulePart, parts.OptimizerPart, parts.StatefulPart)
        watched = {name: unwrapped(objects[name]) for name, part in self.shared.items() if isinstance(part, stateful)}
        self.outside = OutsideState(watched, self.names)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the modules, and those that were given, by name."""
        named = {name: part.likes()(()) for name, part in self.shared.items() if isinstance(part, TensorPart)}
        for name, module in self.modules.items():
            named |= {f"{name}.{key}": one for key, one in (*module.named_parameters(), *module.named_buffers())}
        return named

    @property
    def shapes(self) -> dict[str, str]:
        """The shape and the dtype of each parameter, as text."""
        lazy = torch.nn.parameter.is_lazy
        named = [(name, one) for name, one in self.tensors.items() if isinstance(one, nn.Parameter)]
        return {name: f"{'lazy' if lazy(one) else list(one.shape)} {one.dtype}" for name, one in named}

    def unmade(self, states: Mapping[str, Any]) -> list[str]:
        """Return the names of tensors that have no values in the states, because they are on the meta device."""
        given = {name: states[name] for name, part in self.shared.items() if isinstance(part, TensorPart)}
        for name in self.modules:
            given |= {f"{name}.{key}": value for key, value in states[name].items()}
        return [name for name, value in given.items() if torch.is_tensor(value) and value.is_meta]

    @property
    def shards(self) -> list[str]:
        """The names of tensors that other processes hold parts of."""
        return [name for name, tensor in self.tensors.items() if is_shard(tensor)]

    @property
    def meshes(self) -> list[Any]:
        """The device meshes that tensors are spread over."""
        meshes: list[Any] = []
        for tensor in filter(is_dtensor, self.tensors.values()):
            mesh = tensor.device_mesh  # type: ignore[attr-defined]
            if mesh not in meshes:
                meshes.append(mesh)
        return meshes

    def likes(self) -> Callable[[parts.Keys], Any]:
        """Return a function of a path in the shared state, which returns a tensor that lies as the one there should."""
        of_part = functools.cache(lambda name: self.shared[name].likes())
        return lambda path: of_part(path[0])(path[1:])

    def begin(self) -> None:
        """Remember which objects the program has a reference to, and the values that no state holds."""
        self.outside.begin()
        for part in self.shared.values():
            if isinstance(part, HeldPart):
                part.begin()

    def __getitem__(self, name: str) -> Any:
        part = self._values.get(name) or self.own.get(name)
        if not isinstance(part, (ValuePart, FunctionPart)):
            raise UnknownValueError(self._no_value(name))
        return part.read()

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self._values:  # Only what was given is saved: a new name would be lost.
            raise UnknownValueError(self._no_value(name))
        self._values[name].put(value)

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
            "unchanged": [name for name, part in self._values.items() if part.given == part.value],
        }

    @property
    def parameters(self) -> dict[str, Order]:
        """The names of the parameters of each optimizer, in the order that its state has numbers for."""
        return self._parameters.orders()

    def in_order(
        self, states: Mapping[str, Any], saved: Mapping[str, Order]
    ) -> tuple[dict[str, Any], dict[str, Differences]]:
        """Return the saved states with the parameters of the optimizers in the order that they have here.

        Returns the differences too, of the optimizers whose parameters cannot be put in order, by name.
        """
        return self._parameters.in_order(states, saved)

    def compare(self, states: Mapping[str, Any]) -> Differences:
        """Return how saved states differ from the states that `put` can take."""
        differences = Differences(
            missing=tuple(name for name in self.names if name not in states),
            unexpected=tuple(sorted(set(states) - set(self.names))),
        )
        for name, part in self.shared.items():
            if name in states:
                differences = differences.plus(name, part.compare(states[name]))
        return differences

    def settle(
        self, states: Mapping[str, Any], unchanged: Mapping[str, Any], source: str
    ) -> tuple[dict[str, Any], dict[str, str], list[str]]:
        """Replace settings among the saved states by those that are given now.

        Returns the shared states, how each replaced setting differs, and notes about those that the saved ones replace.
        """
        settled = {name: states[name] for name in self.shared if name in states}
        changes: dict[str, str] = {}
        for name, untouched in unchanged.get("untouched", {}).items():
            part = self.shared.get(name)
            if isinstance(part, MutablePart) and name in states:
                settled[name], changed = part.settled(states[name], untouched)
                changes |= {f"{name}.{key}": change for key, change in changed.items()}
        plain = {name: self._values[name].given for name in unchanged.get("unchanged", ()) if name in self._values}
        notes = [
            f"loop[{name!r}] is {states[name]!r}, as in {source}, and not {given!r}, as given here: a plain value is "
            "put back; settings go into config="
            for name, given in plain.items()
            if name in states and given != states[name]
        ]
        for name, part in self.shared.items():
            overruled = part.overruled(states[name]) if isinstance(part, parts.StatefulPart) and name in states else {}
            notes += [
                f"{name}.{key} is {theirs}, as in {source}, and not {ours}, as given here: a scheduler's state has "
                "its settings. A LambdaLR follows the function that is given here"
                for key, (ours, theirs) in overruled.items()
            ]
        return settled, changes, notes

    def put(self, states: Mapping[str, Any]) -> None:
        """Put the shared states back.

        Parts that may refuse their state come first: their earlier states are small enough to keep for going back.
        """
        large = (parts.ModulePart, parts.OptimizerPart)
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
        self.outside.begin()


def _part_of(name: str, thing: Any) -> parts.Part:
    """Return the part that takes and puts the state of ``thing``."""
    if isinstance(thing, nn.Module):
        _refuse_fsdp1(name, thing)
        return parts.ModulePart(thing)
    if isinstance(thing, torch.optim.Optimizer):
        return parts.OptimizerPart(unwrapped(thing))
    if isinstance(thing, type):
        msg = f"{name} is the class {thing.__name__}; pass the object that the training uses"
        raise PolicyError(msg)
    view = LoaderView(thing)
    if view.inner is not None:
        return view
    if is_stateful(thing):
        return parts.StatefulPart(thing)
    if isinstance(thing, torch.Tensor):
        return TensorPart(name, thing)
    if isinstance(thing, PLAIN):
        return ValuePart(given=thing, value=thing)
    if access := accessors(thing):
        return parts.PlainPart(*access)
    if isinstance(thing, (dict, argparse.Namespace, types.SimpleNamespace)) or dataclasses.is_dataclass(thing):
        return MutablePart(name, thing)
    if hasattr(thing, "set_epoch"):  # A sampler: the loop sets its epoch.
        return parts.PlainPart(dict, bool)
    if callable(thing):
        return FunctionPart(name, thing)
    msg = (
        f"{name} is a {type(thing).__name__}, and nothing of it can be saved: it has no state_dict and no "
        "load_state_dict; pass an object that has them, a tensor, a dataclass, a dict, a namespace or a plain value. A "
        f"value that the program assigns again is given as a function: {name}=lambda: {name}. Settings go into config="
    )
    raise PolicyError(msg)


def world_size() -> int:
    """Return the number of processes of ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _refuse_fsdp1(name: str, module: nn.Module) -> None:
    """Refuse the older FSDP: its optimizers have shards for states, as plain tensors."""
    count = world_size()
    if count > 1 and any(type(part).__name__ == "FullyShardedDataParallel" for part in module.modules()):
        msg = (
            f"{name} is sharded over {count} processes by FullyShardedDataParallel, and a loop would save the shards "
            f"of one; {HOW_TO_SAVE_SHARDS}"
        )
        raise PolicyError(msg)


def _summary_of(name: str, thing: Any, part: parts.Part) -> str:
    """Return how an object is saved. The loop logs it at its start."""
    if isinstance(part, FunctionPart):
        return f"{name} (a function's value at each save)"
    hows = {TensorPart: ", as written in place", ValuePart: f", as loop[{name!r}]"}
    return f"{name} ({type(thing).__name__}{hows.get(type(part), '')})"
