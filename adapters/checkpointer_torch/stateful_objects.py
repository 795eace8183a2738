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
from checkpointer_torch.held_objects import Held
from checkpointer_torch.loader_facts import is_stateful, put_loader, take_loader, torch_loader
from checkpointer_torch.local_values import CarriedPart
from checkpointer_torch.module_names import plain_state, wrapped_state
from checkpointer_torch.mutable_values import MutablePart
from checkpointer_torch.random_state import accessors
from checkpointer_torch.state_differences import Differences, compared

__all__ = ["ModulePart", "OptimizerPart", "Part", "StatefulPart", "TensorPart", "described", "part_of"]

_LIKE_PARAMETER: Final = {
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "momentum_buffer",
    "square_avg",
    "acc_delta",
    "sum",
}
"""What optimizers keep in the shape of the parameter itself."""
_PLAIN: Final = (bool, int, float, complex, str, bytes, type(None))


class Part(Protocol):
    """One object of the training."""

    def take(self) -> Any:
        """Return its state, without a copy where there need not be one."""
        ...

    def compare(self, state: Any) -> Differences:
        """Return how a state differs from what `put` can take; change nothing."""
        ...

    def put(self, state: Any) -> None:
        """Take the state over, as far as it fits."""
        ...


@attrs.frozen
class ModulePart:
    """A module, under plain names."""

    module: nn.Module

    def take(self) -> Any:
        """See `Part.take`."""
        return plain_state(self.module)

    def compare(self, state: Any) -> Differences:
        """See `Part.compare`."""
        if not isinstance(state, Mapping):
            return Differences(missing=("*",))
        return compared(plain_state(self.module), state, types=True)

    def put(self, state: Any) -> None:
        """See `Part.put`."""
        wrapped = wrapped_state(self.module, state)
        for key in compared(self.module.state_dict(), wrapped, types=True).reshaped:
            del wrapped[key]
        self.module.load_state_dict(wrapped, strict=False)


@attrs.frozen
class OptimizerPart:
    """An optimizer. Its state has numbers for names, so that the groups and shapes are what can be compared.

    Only torch's own are known to keep a state in the shape of its parameter; another may project or mask it.
    """

    optimizer: torch.optim.Optimizer

    def take(self) -> Any:
        """See `Part.take`. A `ZeroRedundancyOptimizer` gathers its shards on rank 0, which is a collective."""
        consolidate = getattr(self.optimizer, "consolidate_state_dict", None)
        if consolidate is None:
            return self.optimizer.state_dict()
        consolidate(to=0)
        return self.optimizer.state_dict() if dist.get_rank(self.optimizer.process_group) == 0 else {}  # type: ignore[attr-defined]

    def compare(self, state: Any) -> Differences:
        """See `Part.compare`."""
        groups = self.optimizer.param_groups
        here = {f"param_groups[{number}].params": len(group["params"]) for number, group in enumerate(groups)}
        there = {f"param_groups[{n}].params": len(group["params"]) for n, group in enumerate(state["param_groups"])}
        counts = compared(here, there)
        other = {key: there[key] for key in here if here[key] != there.get(key, here[key])}
        reshaped = {key: f"here {here[key]}, there {count}" for key, count in other.items()}
        return (attrs.evolve(counts, reshaped=reshaped) or self._compare_shapes(state)).all_or_nothing()

    def _compare_shapes(self, state: Any) -> Differences:
        if not f"{type(self.optimizer).__module__}.".startswith("torch.optim."):
            return Differences()
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        differences = Differences()
        for number, parameter in zip(numbers, parameters, strict=True):
            saved = {key: value for key, value in state["state"].get(number, {}).items() if key in _LIKE_PARAMETER}
            tensors = {key: value for key, value in saved.items() if isinstance(value, torch.Tensor)}
            differences += compared(dict.fromkeys(tensors, parameter), tensors).within(f"state[{number}]")
        return differences

    def put(self, state: Any) -> None:
        """See `Part.put`."""
        if not self.compare(state):
            self.optimizer.load_state_dict(state)


@attrs.frozen
class StatefulPart:
    """Anything with ``state_dict`` and ``load_state_dict``: which keys it wants is its own affair."""

    stateful: Any

    def take(self) -> Any:
        """See `Part.take`."""
        return self.stateful.state_dict()

    def compare(self, state: Any) -> Differences:
        """See `Part.compare`."""
        own = self.stateful.state_dict()
        if not isinstance(own, Mapping) or not isinstance(state, Mapping):
            return Differences()
        tensors = {key: value for key, value in own.items() if isinstance(value, torch.Tensor) and key in state}
        return compared(tensors, {key: state[key] for key in tensors})

    def put(self, state: Any) -> None:
        """See `Part.put`."""
        self.stateful.load_state_dict(state)


@attrs.frozen
class TensorPart:
    """A tensor, filled in place."""

    held: Held

    def take(self) -> Any:
        """See `Part.take`."""
        self.held.check()
        return self.held.thing.detach()

    def compare(self, state: Any) -> Differences:
        """See `Part.compare`."""
        return compared({"value": self.held.thing}, {"value": state}).all_or_nothing()

    @torch.no_grad()
    def put(self, state: Any) -> None:
        """See `Part.put`."""
        if not self.compare(state):
            self.held.thing.copy_(state)


@attrs.frozen
class PlainPart:
    """What takes any state of its kind."""

    read: Callable[[], Any]
    write: Callable[[Any], object]

    def take(self) -> Any:
        """See `Part.take`."""
        return self.read()

    def compare(self, state: Any) -> Differences:
        """See `Part.compare`."""
        return Differences()

    def put(self, state: Any) -> None:
        """See `Part.put`."""
        self.write(state)


def part_of(name: str, thing: Any, values: dict[str, Any]) -> Part:
    """Return what takes and puts the state of ``thing``; of a plain value in ``values``.

    Raises:
        PolicyError: If nothing is known that could be saved of it.
    """
    if isinstance(thing, nn.Module):
        _check_whole(name, thing)
        return ModulePart(thing)
    if isinstance(thing, torch.optim.Optimizer):
        return OptimizerPart(thing)
    if isinstance(thing, type):
        msg = f"{name} is the class {thing.__name__}; pass the object that the training uses"
        raise PolicyError(msg)
    if torch_loader(thing) is not None:
        return PlainPart(lambda: take_loader(thing), lambda state: put_loader(thing, state))
    if is_stateful(thing):
        return StatefulPart(thing)
    if isinstance(thing, torch.Tensor):
        return TensorPart(Held(name, thing))
    if isinstance(thing, _PLAIN):
        values[name] = thing
        return PlainPart(lambda: values[name], lambda state: values.update({name: state}))
    part = _drawn(thing) or _fields(name, thing)
    if part is not None:
        return part
    if callable(thing):
        return CarriedPart(name, thing)
    msg = (
        f"{name} is a {type(thing).__name__}, and nothing of it can be saved: it has no state_dict and no "
        "load_state_dict; pass what has them, a tensor, a dataclass, a dict, a namespace or a plain value. A "
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


def described(thing: Any, name: str, part: Part) -> str:
    """Return how an object is saved, in the few words that the loop logs at its start."""
    kind = type(thing).__name__
    if isinstance(part, TensorPart):
        return f"{name} ({kind}, as written in place)"
    if isinstance(part, CarriedPart):
        return f"{name} (a function's value at each save)"
    if isinstance(thing, _PLAIN):
        return f"{name} ({kind}, as loop[{name!r}])"
    return f"{name} ({kind})"


def _drawn(thing: Any) -> Part | None:
    access = accessors(thing)
    return PlainPart(*access) if access else None


def _fields(name: str, thing: Any) -> Part | None:
    if isinstance(thing, dict):
        return MutablePart(Held(name, thing), lambda thing: thing, _refill)
    if isinstance(thing, (argparse.Namespace, types.SimpleNamespace)):
        return MutablePart(Held(name, thing), vars, lambda thing, state: _refill(vars(thing), state))
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        if thing.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            msg = (
                f"{name} is a frozen {type(thing).__name__}, so that nothing can be put back into it; pass settings as "
                "config=, and what the training changes in a dataclass that is not frozen"
            )
            raise PolicyError(msg)
        return MutablePart(Held(name, thing), _values, _fill)
    if hasattr(thing, "set_epoch"):  # A sampler: its epoch is the loop's.
        return PlainPart(dict, bool)
    return None


def _refill(thing: dict[Any, Any], state: Mapping[Any, Any]) -> None:
    thing.clear()
    thing.update(state)


def _values(thing: Any) -> dict[str, Any]:
    return {field.name: getattr(thing, field.name) for field in dataclasses.fields(thing)}


def _fill(thing: Any, state: Mapping[str, Any]) -> None:
    for field in dataclasses.fields(thing):
        if field.name in state:
            setattr(thing, field.name, state[field.name])
