"""The objects of a training, each as something whose state can be taken, compared and put back."""

from __future__ import annotations

import argparse
import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import attrs
import torch
import torch.distributed as dist
from torch import nn

from checkpointer.errors import PolicyError, SaveError
from checkpointer.formats.pickler import HOW_TO_SAVE_SHARDS, check_whole
from checkpointer_torch.loader_view import LoaderView, is_stateful
from checkpointer_torch.module_names import plain_state, wrapped_state
from checkpointer_torch.program_values import PLAIN, FunctionPart, Held, MutablePart
from checkpointer_torch.random_state import accessors
from checkpointer_torch.state_differences import Differences, compared

__all__ = ["Part", "part_of", "summary_of"]

_LIKE_PARAMETER: Final = frozenset(
    ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "acc_delta", "sum")
)
"""States that optimizers keep in the shape of the parameter itself."""


class Part(Protocol):
    """One object of the training."""

    def take(self) -> Any:
        """Return its state, without a copy where one is not needed."""
        ...

    def compare(self, state: Any) -> Differences:
        """Return how a state differs from the states that `put` can take; change nothing."""
        ...

    def put(self, state: Any) -> object:
        """Take the state over, as far as it fits."""
        ...


@attrs.frozen
class ModulePart:
    """A module, under plain names."""

    module: nn.Module

    def take(self) -> Any:
        return plain_state(self.module)

    def compare(self, state: Any) -> Differences:
        if not isinstance(state, Mapping):
            return Differences(missing=("*",))
        return compared(plain_state(self.module), state, types=True)

    def put(self, state: Any) -> None:
        wrapped = wrapped_state(self.module, state)
        for key in compared(self.module.state_dict(), wrapped, types=True).reshaped:
            del wrapped[key]
        self.module.load_state_dict(wrapped, strict=False)


@attrs.frozen
class OptimizerPart:
    """An optimizer. Its state has numbers for names, so only the groups and the shapes can be compared.

    Torch's own optimizers keep a state in the shape of its parameter; another optimizer may project or mask it.
    """

    optimizer: torch.optim.Optimizer

    def take(self) -> Any:
        # A ZeroRedundancyOptimizer gathers its shards on rank 0, which is a collective.
        consolidate = getattr(self.optimizer, "consolidate_state_dict", None)
        if consolidate is None:
            return self.optimizer.state_dict()
        consolidate(to=0)
        return self.optimizer.state_dict() if dist.get_rank(self.optimizer.process_group) == 0 else {}  # type: ignore[attr-defined]

    def compare(self, state: Any) -> Differences:
        here, there = (
            {f"param_groups[{number}].params": len(group["params"]) for number, group in enumerate(groups)}
            for groups in (self.optimizer.param_groups, state["param_groups"])
        )
        counts = compared(here, there)
        other = {key: there[key] for key in here if here[key] != there.get(key, here[key])}
        reshaped = {key: f"here {here[key]}, there {count}" for key, count in other.items()}
        return (attrs.evolve(counts, reshaped=reshaped) or self._compare_shapes(state)).all_or_nothing()

    def _compare_shapes(self, state: Any) -> Differences:
        differences = Differences()
        if not f"{type(self.optimizer).__module__}.".startswith("torch.optim."):
            return differences
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            saved = {key: value for key, value in state["state"].get(number, {}).items() if key in _LIKE_PARAMETER}
            tensors = {key: value for key, value in saved.items() if isinstance(value, torch.Tensor)}
            differences += compared(dict.fromkeys(tensors, parameter), tensors).within(f"state[{number}]")
        return differences

    def put(self, state: Any) -> None:
        if not self.compare(state):
            self.optimizer.load_state_dict(state)


@attrs.frozen
class StatefulPart:
    """Any object with ``state_dict`` and ``load_state_dict``. It decides itself which keys it wants."""

    stateful: Any

    def take(self) -> Any:
        return self.stateful.state_dict()

    def compare(self, state: Any) -> Differences:
        own = self.stateful.state_dict()
        if not isinstance(own, Mapping) or not isinstance(state, Mapping):
            return Differences()
        tensors = {key: value for key, value in own.items() if isinstance(value, torch.Tensor) and key in state}
        return compared(tensors, {key: state[key] for key in tensors})

    def put(self, state: Any) -> None:
        self.stateful.load_state_dict(state)


@attrs.frozen
class TensorPart:
    """A tensor, filled in place."""

    held: Held

    def take(self) -> Any:
        self.held.check()
        return self.held.thing.detach()

    def compare(self, state: Any) -> Differences:
        return compared({"value": self.held.thing}, {"value": state}).all_or_nothing()

    @torch.no_grad()
    def put(self, state: Any) -> None:
        if not self.compare(state):
            self.held.thing.copy_(state)


@attrs.frozen
class PlainPart:
    """An object that takes any state of its kind."""

    take: Callable[[], Any]
    put: Callable[[Any], object]

    def compare(self, state: Any) -> Differences:
        return Differences()


def part_of(name: str, thing: Any, values: dict[str, Any]) -> Part:
    """Return the part that takes and puts the state of ``thing``; a plain value is kept in ``values``.

    Raises:
        PolicyError: If nothing of it can be saved.
    """
    if isinstance(thing, nn.Module):
        _check_whole(name, thing)
        return ModulePart(thing)
    if isinstance(thing, torch.optim.Optimizer):
        return OptimizerPart(thing)
    if isinstance(thing, type):
        msg = f"{name} is the class {thing.__name__}; pass the object that the training uses"
        raise PolicyError(msg)
    view = LoaderView(thing)
    if view.inner is not None:
        return PlainPart(view.take, view.put)
    if is_stateful(thing):
        return StatefulPart(thing)
    if isinstance(thing, torch.Tensor):
        return TensorPart(Held(name, thing))
    if isinstance(thing, PLAIN):
        values[name] = thing
        return PlainPart(lambda: values[name], lambda state: values.update({name: state}))
    access = accessors(thing)
    part = PlainPart(*access) if access else _fields(name, thing)
    if part is not None:
        return part
    if callable(thing):
        return FunctionPart(name, thing)
    msg = (
        f"{name} is a {type(thing).__name__}, and nothing of it can be saved: it has no state_dict and no "
        "load_state_dict; pass an object that has them, a tensor, a dataclass, a dict, a namespace or a plain value. A "
        f"value that the program binds anew is given as a function: {name}=lambda: {name}. Settings go into config="
    )
    raise PolicyError(msg)


def _check_whole(name: str, module: nn.Module) -> None:
    for key, tensor in (*module.named_parameters(), *module.named_buffers()):
        try:
            check_whole(tensor, f"{name}.{key}")
        except SaveError as error:
            raise PolicyError(str(error)) from None
    count = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if count > 1 and any(type(part).__name__ == "FullyShardedDataParallel" for part in module.modules()):
        msg = (
            f"{name} is sharded over {count} processes by FullyShardedDataParallel, and a loop would save the shards "
            f"of one; {HOW_TO_SAVE_SHARDS}"
        )
        raise PolicyError(msg)


def summary_of(thing: Any, name: str, part: Part) -> str:
    """Return how an object is saved. The loop logs it at its start."""
    how = ""
    if isinstance(part, TensorPart):
        how = ", as written in place"
    elif isinstance(thing, PLAIN):
        how = f", as loop[{name!r}]"
    elif isinstance(part, FunctionPart):
        return f"{name} (a function's value at each save)"
    return f"{name} ({type(thing).__name__}{how})"


def _fields(name: str, thing: Any) -> Part | None:
    if isinstance(thing, dict):
        return MutablePart(Held(name, thing), lambda thing: thing, _refill)
    if isinstance(thing, (argparse.Namespace, types.SimpleNamespace)):
        return MutablePart(Held(name, thing), vars, lambda thing, state: _refill(vars(thing), state))
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        if thing.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            msg = (
                f"{name} is a frozen {type(thing).__name__}, so a resume cannot set its fields; pass settings as "
                "config=, and values that the training changes in a dataclass that is not frozen"
            )
            raise PolicyError(msg)
        names = [field.name for field in dataclasses.fields(thing)]
        return MutablePart(
            Held(name, thing),
            lambda thing: {name: getattr(thing, name) for name in names},
            _set_fields,
        )
    if hasattr(thing, "set_epoch"):  # A sampler: the loop sets its epoch.
        return PlainPart(dict, bool)
    return None


def _set_fields(thing: Any, state: Mapping[str, Any]) -> None:
    for field in dataclasses.fields(thing):
        if field.name in state:
            setattr(thing, field.name, state[field.name])


def _refill(thing: dict[Any, Any], state: Mapping[Any, Any]) -> None:
    thing.clear()
    thing.update(state)
