"""The parameters of an optimizer by name. A saved state has numbers for them, in the order of its own process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import attrs
import torch
from torch import nn

from checkpointer_torch.object_parts import plain_names
from checkpointer_torch.state_differences import Differences

Order = Sequence[Sequence[str]]
"""The names of the parameters in each group."""
_UNNAMED: Final = "parameter without a name "


@attrs.frozen
class ParameterNames:
    """The optimizers of a training, and the modules that their parameters have names in."""

    modules: Mapping[str, nn.Module]
    optimizers: Mapping[str, torch.optim.Optimizer]
    _last: dict[str, Any] = attrs.field(factory=dict, init=False, eq=False)
    """The names that were returned last, and what they are the names of: to find them takes long in a large model."""

    def orders(self) -> dict[str, Order]:
        """Return the names of the parameters of each optimizer, in the order of its groups."""
        groups = {name: optimizer.param_groups for name, optimizer in self.optimizers.items()}
        now = {name: [list(map(id, group["params"])) for group in of_one] for name, of_one in groups.items()}
        if "orders" not in self._last or now != self._last["parameters"]:
            names = _named(self.modules) if groups else {}
            orders = {name: _order_of(of_one, names) for name, of_one in groups.items()}
            self._last.update(parameters=now, orders=orders)
        last: dict[str, Order] = self._last["orders"]
        return last

    def in_order(
        self, states: Mapping[str, Any], saved: Mapping[str, Order]
    ) -> tuple[dict[str, Any], dict[str, Differences]]:
        """Return the states in the orders of `orders`, and the differences of those that cannot be put in order."""
        ordered, differences = dict(states), {}
        names = _named(self.modules) if saved else {}
        known = _known(self.modules, names) if saved else {}
        for name, optimizer in self.optimizers.items():
            state = states.get(name)
            if not (isinstance(state, Mapping) and "param_groups" in state):
                continue
            there = saved.get(name) or _order_of(state["param_groups"], {})
            change = _Reordering.of(_order_of(optimizer.param_groups, names), there, known)
            if not change.is_needed:
                continue
            if found := change.differences(may_reorder=_may_reorder(optimizer)):
                differences[name] = found
            else:
                ordered[name] = change.reordered(state)
        return ordered, differences


def _named(modules: Mapping[str, nn.Module]) -> dict[int, str]:
    """Return one name for each parameter, by its ``id``. A tied parameter has the same name in each process."""
    names: dict[int, str] = {}
    for full, parameter in _full_names(modules):
        names[parameter] = min(full, names.get(parameter, full))
    return names


def _known(modules: Mapping[str, nn.Module], names: Mapping[int, str]) -> dict[str, str]:
    """Return the name that `_named` has for a parameter, by each name that it has in the modules."""
    return {full: names[parameter] for full, parameter in _full_names(modules)}


def _full_names(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, int]]:
    """Yield each name of each parameter, and its ``id``."""
    for name, module in modules.items():
        plain = plain_names(module)
        # A class may override named_parameters() without this argument.
        for key, parameter in nn.Module.named_parameters(module, remove_duplicate=False):
            yield f"{name}.{plain(key)}", id(parameter)


def _order_of(groups: Sequence[Mapping[str, Any]], names: Mapping[int, str]) -> list[list[str]]:
    """Return the names of the parameters of an optimizer; its own ``param_names`` for those of no module."""
    unnamed = itertools.count()

    def of(group: Mapping[str, Any]) -> Iterator[str]:
        own = itertools.chain(group.get("param_names", ()), itertools.repeat(None))
        for parameter, given in zip(group["params"], own, strict=False):
            yield names.get(id(parameter)) or given or f"{_UNNAMED}{next(unnamed)}"

    return [list(of(group)) for group in groups]


@attrs.frozen
class _Reordering:
    """What a saved state needs so that each parameter gets its own part of it."""

    here: Order
    there: Order

    @classmethod
    def of(cls, here: Order, there: Order, known: Mapping[str, str]) -> _Reordering:
        """Compare two orders. A name at the same place that only its own side knows is a new name of the parameter.

        The hooks of a module rename parameters, and so do wrappers around a model that the Loop was not given.
        """
        theirs = [[known.get(name, name) for name in group] for group in there]
        is_here = {*known.values(), *itertools.chain(*here)}.__contains__
        is_there = set(itertools.chain(*theirs)).__contains__
        if list(map(len, here)) == list(map(len, there)):
            theirs = [
                [our if not (is_here(their) or is_there(our)) else their for our, their in zip(*groups, strict=True)]
                for groups in zip(here, theirs, strict=True)
            ]
        return cls(here, theirs)

    @property
    def is_needed(self) -> bool:
        """Whether the orders differ. A parameter that has a name on one side only cannot be found again."""
        both = [[name for group in order for name in group] for order in (self.here, self.there)]
        unnamed = [sum(name.startswith(_UNNAMED) for name in names) for names in both]
        counts = [[len(group) for group in order] for order in (self.here, self.there)]
        return both[0] != both[1] and counts[0] == counts[1] and unnamed[0] == unnamed[1]

    def differences(self, *, may_reorder: bool) -> Differences:
        """Return the parameters whose state cannot be found in the group that they are in here."""
        pairs = list(zip(self.here, self.there, strict=True))
        if may_reorder and all(len({*here}) == len(here) and {*here} == {*there} for here, there in pairs):
            return Differences()
        misplaced = {
            f"param_groups[{group}].params[{number}]": f"here {ours}, there {theirs}"
            for group, (here, there) in enumerate(pairs)
            for number, (ours, theirs) in enumerate(zip(here, there, strict=True))
            if ours != theirs
        }
        return Differences(misplaced=misplaced).all_or_nothing()

    def reordered(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state with its numbers in the order that the parameters have here."""
        groups = [dict(group) for group in state["param_groups"]]
        for group, here, there in zip(groups, self.here, self.there, strict=True):
            numbers = dict(zip(there, group["params"], strict=True))
            group["params"] = [numbers[name] for name in here]
            if given := group.get("param_names"):
                by_name = dict(zip(there, given, strict=False))
                group["param_names"] = [by_name.get(name, name) for name in here]
        return {**state, "param_groups": groups}


def _may_reorder(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the optimizer is known to keep a state of its own for each parameter."""
    made_by = f"{type(optimizer).step.__module__}."
    return made_by.startswith("torch.optim.") and not isinstance(optimizer, torch.optim.LBFGS)
