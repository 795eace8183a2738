"""The objects of a training, each as a part whose state can be taken, compared and put back."""

from __future__ import annotations

import abc
import copy
import dataclasses
import functools
import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import attrs
import torch
import torch.distributed as dist
from torch import nn

from checkpointer.errors import PolicyError, warn
from checkpointer.formats.dtypes import holds
from checkpointer.formats.inspection.weights import WRAPPERS
from checkpointer_torch.layouts import fitted
from checkpointer_torch.state_differences import Differences, compared

PLAIN: Final = (bool, int, float, complex, str, bytes, type(None))
"""Types of plain values."""
_LIKE_PARAMETER: Final = frozenset(
    ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "acc_delta", "sum")
)
"""States that optimizers keep in the shape of the parameter itself."""
_SCHEDULE: Final = frozenset(
    ("T_0", "T_max", "_milestones", "base_lrs", "milestones", "step_size", "total_iters", "total_steps")
)
"""Settings in the state of a scheduler of torch that say how long and how high it is."""
_ARRAY: Final = "numpy array"
"""Marks a numpy array that is saved as a tensor, because a safe load refuses arrays."""
_MANY: Final = 1000
"""A dict with more entries is data as a whole, and no entry of it is a setting."""
_DATA: Final = object()
"""Stands for a value that cannot be a setting."""
_OWN_REFERENCES: Final = 2
"""How many references there are while `HeldPart` counts them, if the program has none."""

Keys = tuple[Any, ...]


class Part(abc.ABC):
    """One object of the training."""

    @abc.abstractmethod
    def take(self) -> Any:
        """Return its state, without a copy where one is not needed."""

    def compare(self, state: Any) -> Differences:
        """Return how a state differs from the states that `put` can take; change nothing."""
        return Differences()

    @abc.abstractmethod
    def put(self, state: Any) -> None:
        """Take the state over, as far as it fits."""

    def likes(self) -> Callable[[Keys], Any]:
        """Return a function of a path in the state, which returns a tensor that lies as the one there should."""
        return lambda _: None


@attrs.frozen
class PlainPart(Part):
    """An object that takes any state of its kind."""

    read: Callable[[], Any]
    write: Callable[[Any], object]

    def take(self) -> Any:
        return self.read()

    def put(self, state: Any) -> None:
        self.write(state)


@attrs.frozen
class ModulePart(Part):
    """A module, under the names that it has without the wrappers of DDP and ``torch.compile``."""

    module: nn.Module

    def take(self) -> OrderedDict[str, Any]:
        name, state = _namer(self.module), self.module.state_dict()
        plain = OrderedDict((name(key), value) for key, value in state.items())
        versions = getattr(state, "_metadata", {})
        plain._metadata = {name(path): value for path, value in versions.items()}  # type: ignore[attr-defined]
        return plain

    def compare(self, state: Any) -> Differences:
        if not isinstance(state, Mapping):
            return Differences(missing=("*",))
        found = compared(self.take(), state, types=True)
        if not found.reshaped:
            return found
        own = {_namer(self.module)(key): key for key in self.module.state_dict()}
        reshaped = {
            key: how for key, how in found.reshaped.items() if not _fits_itself(self.module, own[key], state[key])
        }
        return attrs.evolve(found, reshaped=reshaped)

    def put(self, state: Any) -> None:
        name, own = _namer(self.module), self.module.state_dict()
        wrapped = OrderedDict((key, state[name(key)]) for key in own if name(key) in state)
        for key in compared(own, wrapped, types=True).reshaped:
            if not _fits_itself(self.module, key, wrapped[key]):
                del wrapped[key]
        versions, paths = getattr(state, "_metadata", {}), getattr(own, "_metadata", {})
        wrapped._metadata = {path: versions[name(path)] for path in paths if name(path) in versions}  # type: ignore[attr-defined]
        self.module.load_state_dict(fitted(own, wrapped), strict=False)

    def likes(self) -> Callable[[Keys], Any]:
        return functools.partial(_at, self.take())


def _fits_itself(module: nn.Module, key: str, value: Any) -> bool:
    """Return whether the module of a key takes a tensor of another shape, as the observers of a quantisation do."""
    path, _, name = key.rpartition(".")
    try:
        inner = module.get_submodule(path)
        if type(inner)._load_from_state_dict is nn.Module._load_from_state_dict:
            return False
        trial = copy.deepcopy(inner)
        trial.load_state_dict({name: value}, strict=False)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return not compared(trial.state_dict(), {name: value}, types=True).reshaped


def _namer(module: nn.Module) -> Callable[[str], str]:
    """Return a function that takes the names of wrappers out of a key, or out of a path of modules."""
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    modules = module.named_modules(remove_duplicate=False)
    wrapped = {f"{path}.module".lstrip(".") for path, inner in modules if isinstance(inner, parallel)}

    def plain(key: str) -> str:
        parts = key.split(".")
        paths = (".".join(parts[: number + 1]) for number in range(len(parts)))
        return ".".join(
            part for part, path in zip(parts, paths, strict=True) if part not in WRAPPERS and path not in wrapped
        )

    return plain


@attrs.frozen
class OptimizerPart(Part):
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
        if not _has_groups(state):  # An optimizer around another one may have a form of its own.
            has_own_form = type(self.optimizer).state_dict is not torch.optim.Optimizer.state_dict
            return Differences() if has_own_form else Differences(missing=("param_groups",))
        here, there = (
            {f"param_groups[{number}].params": len(group["params"]) for number, group in enumerate(groups)}
            for groups in (self.optimizer.param_groups, state["param_groups"])
        )
        counts = [(key, count, there.get(key, count)) for key, count in here.items()]
        reshaped = {key: f"here {ours}, there {theirs}" for key, ours, theirs in counts if ours != theirs}
        return (attrs.evolve(compared(here, there), reshaped=reshaped) or self._compare_shapes(state)).all_or_nothing()

    def _compare_shapes(self, state: Any) -> Differences:
        differences = Differences()
        if not self._is_of_torch:
            return differences
        for number, parameter in self._numbered(state["param_groups"]).items():
            saved = state["state"].get(number, {}).items()
            tensors = {key: value for key, value in saved if key in _LIKE_PARAMETER and torch.is_tensor(value)}
            differences = differences.plus(f"state[{number}]", compared(dict.fromkeys(tensors, parameter), tensors))
        return differences

    def put(self, state: Any) -> None:
        if self.compare(state):
            return
        if not _has_groups(state):
            self.optimizer.load_state_dict(state)
            return
        fitted_states = self._fitted(state)
        self.optimizer.load_state_dict({**state, "state": fitted_states})
        for number, parameter in self._numbered(state["param_groups"]).items():
            self._undo_rounding(self.optimizer.state.get(parameter, {}), fitted_states.get(number, {}))

    def _undo_rounding(self, own: dict[str, Any], saved: Mapping[str, Any]) -> None:
        """Put back the states that torch has converted to the type of the parameter, as NAdam's float32 product.

        Torch's optimizers keep some states in that type, so those stay converted.
        """
        kept = _LIKE_PARAMETER if self._is_of_torch else ()
        for key, value in saved.items():
            now = own.get(key)
            if key not in kept and torch.is_tensor(value) and torch.is_tensor(now) and _is_rounded(value, now.dtype):
                own[key] = value.to(now.device)

    @property
    def _is_of_torch(self) -> bool:
        return f"{type(self.optimizer).__module__}.".startswith("torch.optim.")

    def _fitted(self, state: Mapping[str, Any]) -> dict[Any, Any]:
        """Return the states of the parameters, in the layouts of those."""
        fitted_states = dict(state["state"])
        for number, parameter in self._numbered(state["param_groups"]).items():
            values = fitted_states.get(number, {})
            arrays = {key: parameter for key, value in values.items() if torch.is_tensor(value) and value.dim()}
            if arrays:
                fitted_states[number] = fitted(arrays, values)
        return fitted_states

    def _numbered(self, groups: Sequence[Mapping[str, Any]]) -> dict[Any, Any]:
        """Return the parameters by their numbers in the groups of a state."""
        numbers = [number for group in groups for number in group["params"]]
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        return dict(zip(numbers, parameters, strict=True))

    def likes(self) -> Callable[[Keys], Any]:
        # Not from `take`, which may be a collective. The numbers are those that `state_dict` gives.
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

        def like(path: Keys) -> Any:
            what, *rest = path
            if what != "state" or not rest or not isinstance(rest[0], int) or rest[0] >= len(parameters):
                return None
            parameter = parameters[rest[0]]
            own = _at(self.optimizer.state.get(parameter, {}), rest[1:])
            return parameter if own is None else own

        return like


def _is_rounded(value: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether a conversion to a type may change a value, or makes floats of what is none."""
    return value.dtype != dtype and not (value.is_floating_point() and holds(dtype, value.dtype))


def _has_groups(state: Any) -> bool:
    return isinstance(state, Mapping) and "param_groups" in state and "state" in state


@attrs.frozen
class StatefulPart(Part):
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
        self.stateful.load_state_dict(fitted(self.stateful.state_dict(), state))

    def overruled(self, state: Any) -> dict[str, tuple[Any, Any]]:
        """Return the settings of a schedule that a state replaces, as given here and as saved, by name."""
        is_schedule = isinstance(self.stateful, torch.optim.lr_scheduler.LRScheduler) and isinstance(state, Mapping)
        return dict(_overruled(self.stateful.state_dict(), state)) if is_schedule else {}

    def likes(self) -> Callable[[Keys], Any]:
        return functools.partial(_at, self.stateful.state_dict())


def _overruled(here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for key in filter(there.__contains__, here):
        ours, theirs = here[key], there[key]
        if key in _SCHEDULE and repr(ours) != repr(theirs):
            yield key, (ours, theirs)
        elif key == "_schedulers":  # Those within a SequentialLR or a ChainedScheduler.
            for number, (mine, saved) in enumerate(zip(ours, theirs, strict=False)):
                yield from ((f"{key}[{number}].{name}", both) for name, both in _overruled(mine, saved))


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
                f"{name!r} is saved as the object that was given to the Loop, and the program has no reference to that "
                f"object any more: if it has bound the name to another one, that one is not saved. Pass "
                f"{name}=lambda: {name}, and read loop[{name!r}] after resume()"
            )
            warn(msg)


class TensorPart(HeldPart):
    """A tensor, filled in place."""

    def take(self) -> Any:
        self.check()
        return self._thing.detach()

    def compare(self, state: Any) -> Differences:
        return compared({"value": self._thing}, {"value": state}).all_or_nothing()

    @torch.no_grad()
    def put(self, state: Any) -> None:
        if not self.compare(state):
            self._thing.copy_(fitted(self._thing, state))

    def likes(self) -> Callable[[Keys], Any]:
        return functools.partial(_at, self._thing)


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
                f"{self._name!r} was put back by resume(), and the program has not read it: it went on with another "
                f"value, which is not exact. Read loop[{self._name!r}] after resume()"
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


def _at(state: Any, path: Sequence[Any]) -> Any:
    """Return what is at a path of a state; None if there is nothing."""
    for key in path:
        try:
            state = state[key]
        except (KeyError, IndexError, TypeError):
            return None
    return state


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    if type(value) is dict:
        return {key: function(item) for key, item in value.items()}
    return type(value)(map(function, value)) if type(value) in (list, tuple) else value
