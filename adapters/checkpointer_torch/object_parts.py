"""The objects of a training, each as a part whose state can be taken, compared and put back; see `value_parts` too."""

from __future__ import annotations

import abc
import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import attrs
import torch
import torch.distributed as dist
from torch import nn

from checkpointer._display import some_of
from checkpointer.errors import warn
from checkpointer.formats.dtypes import holds
from checkpointer.formats.inspection.find_weights import WRAPPERS
from checkpointer_torch.load_hooks import Hooked, hooked
from checkpointer_torch.optimizer_values import GroupLinks, undone, without_texts
from checkpointer_torch.state_differences import Differences, are_alike, compared
from checkpointer_torch.tensor_layouts import fitted

_LIKE_PARAMETER: Final = frozenset(
    ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "acc_delta", "sum")
)
"""States that optimizers keep in the shape of the parameter itself."""
_SCHEDULE: Final = frozenset(
    ("T_0", "T_max", "_milestones", "base_lrs", "milestones", "step_size", "total_iters", "total_steps")
)
"""Settings in the state of a scheduler of torch that say how long and how high it is."""
_SHOWN: Final = 5
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
        name, state = plain_names(self.module), self.module.state_dict()
        plain = OrderedDict((name(key), value) for key, value in state.items())
        versions = getattr(state, "_metadata", {})
        plain._metadata = {name(path): value for path, value in versions.items()}  # type: ignore[attr-defined]
        return plain

    def compare(self, state: Any) -> Differences:
        if not isinstance(state, Mapping):
            return Differences(missing=("*",))
        state = self.hooked(state).values
        found = compared(self.take(), state, types=True)
        if not found.reshaped:
            return found
        keys = list(self.module.state_dict())
        own = dict(zip(map(plain_names(self.module), keys), keys, strict=True))
        reshaped = {
            key: how for key, how in found.reshaped.items() if not _fits_itself(self.module, own[key], state[key])
        }
        return attrs.evolve(found, reshaped=reshaped)

    def put(self, state: Any) -> None:
        own, (wrapped, _) = self.module.state_dict(), _wrapped(self.module, state)
        found = hooked(self.module, wrapped)
        for key in compared(own, found.values, types=True).reshaped:
            if not _fits_itself(self.module, key, found.values[key]):
                # Hooks may need all the names that they take: those get the value that the module has.
                same = [name for name in found.replaced if wrapped[name] is found.values[key]]
                wrapped |= dict.fromkeys(same, own[key])
                wrapped.pop(key, None)
        for key in wrapped.keys() - own.keys() - found.replaced:
            del wrapped[key]
        left = self.module.load_state_dict(fitted(own, wrapped), strict=False).unexpected_keys
        if lost := [key for key in left if key not in own or not are_alike((own[key], wrapped[key]))]:
            msg = (
                f"the {type(self.module).__name__} saves {some_of(lost, _SHOWN)}, and its load_state_dict does not "
                "take them: it keeps the values that it has now, and they are not the saved ones"
            )
            warn(msg)

    def hooked(self, state: Mapping[str, Any]) -> Hooked:
        """Return a state as the module sees it after its own hooks."""
        plain = plain_names(self.module)
        wrapped, saved = _wrapped(self.module, state)
        found = hooked(self.module, wrapped)
        values = {saved[key] if key in saved else plain(key): value for key, value in found.values.items()}
        return Hooked(values, frozenset(saved[key] for key in found.replaced))

    def likes(self) -> Callable[[Keys], Any]:
        return functools.partial(state_at, self.take())


def _wrapped(module: nn.Module, state: Mapping[str, Any]) -> tuple[OrderedDict[str, Any], dict[str, str]]:
    """Return a state under the names that the module has with its wrappers, and the saved name of each."""
    plain, own = plain_names(module), module.state_dict()
    saved = {key: plain(key) for key in own if plain(key) in state}
    paths = {plain(path): path for path, _ in module.named_modules(remove_duplicate=False)}
    for key in state.keys() - set(saved.values()):
        path, _, name = str(key).rpartition(".")
        saved[".".join(filter(None, (paths.get(path, path), name)))] = key
    wrapped = OrderedDict((key, state[name]) for key, name in saved.items())
    versions, own_versions = getattr(state, "_metadata", {}), getattr(own, "_metadata", {})
    wrapped._metadata = {path: versions[plain(path)] for path in own_versions if plain(path) in versions}  # type: ignore[attr-defined]
    return wrapped, saved


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


def plain_names(module: nn.Module) -> Callable[[str], str]:
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
        reshaped = {key: f"here {n}, there {there[key]}" for key, n in here.items() if there.get(key, n) != n}
        # Torch ignores a state whose number is a text, as some conversions write it.
        texts = tuple(f"state[{key!r}]" for key in state["state"] if isinstance(key, str) and key.isdigit())
        found = compared(here, there)
        found = attrs.evolve(found, reshaped=reshaped, unexpected=(*found.unexpected, *texts))
        return (found or self._compare_shapes(state)).all_or_nothing()

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
        fitted_states, links = self._fitted(state), GroupLinks.of(self.optimizer)
        self.optimizer.load_state_dict({**state, "state": without_texts(fitted_states)})
        for number, parameter in self._numbered(state["param_groups"]).items():
            own = self.optimizer.state.get(parameter)
            if isinstance(own, dict):
                own.update(undone(own, fitted_states.get(number) or {}, self._choose))
        links.put_back(self.optimizer)

    def _choose(self, key: Any, now: torch.Tensor, saved: torch.Tensor) -> torch.Tensor:
        """Return the saved tensor if torch has rounded it to the type of the parameter, as NAdam's float32 product.

        Torch's optimizers keep all arrays in that type, so those stay converted.
        """
        stays = self._is_of_torch and (saved.dim() or key in _LIKE_PARAMETER)
        return saved.to(now.device) if _is_rounded(saved, now.dtype) and not stays else now

    @property
    def _is_of_torch(self) -> bool:
        """Whether torch's own code makes the states, as it does for a class that changes nothing but the options."""
        return f"{type(self.optimizer).step.__module__}.".startswith("torch.optim.")

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
            own = state_at(self.optimizer.state.get(parameter, {}), rest[1:])
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
        return functools.partial(state_at, self.stateful.state_dict())


def _overruled(here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for key in filter(there.__contains__, here):
        ours, theirs = here[key], there[key]
        if key in _SCHEDULE and repr(ours) != repr(theirs):
            yield key, (ours, theirs)
        elif key == "_schedulers":  # Those within a SequentialLR or a ChainedScheduler.
            for number, (mine, saved) in enumerate(zip(ours, theirs, strict=False)):
                yield from ((f"{key}[{number}].{name}", both) for name, both in _overruled(mine, saved))


def state_at(state: Any, path: Sequence[Any]) -> Any:
    """Return what is at a path of a state; None if there is nothing."""
    for key in path:
        try:
            state = state[key]
        except (KeyError, IndexError, TypeError):
            return None
    return state
