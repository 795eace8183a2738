"""The names that a module's own hooks give to a state, such as one of an older version of torch."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, MutableMapping
from typing import Any, Final

import attrs
import torch
from torch import nn

_LARGE: Final = 1
"""Tensors of more numbers are copied without their memory."""


@attrs.frozen
class Hooked:
    """A state after the hooks."""

    values: Mapping[str, Any]
    """What the module takes, under its own names; what it does not take, under the saved names."""
    replaced: frozenset[str] = frozenset()
    """Saved names that the module does not have, and that its hooks take."""


def hooked(module: nn.Module, state: Mapping[str, Any]) -> Hooked:
    """Return a state as ``module.load_state_dict`` sees it after the module's own hooks.

    ``torch.nn.utils.parametrizations.weight_norm``, for example, takes ``weight_g`` and ``weight_v``, the names of the
    older ``weight_norm``. The module stays as it is: a copy without memory loads the state.

    Example:
        >>> new = nn.utils.parametrizations.weight_norm(nn.Linear(2, 1, bias=False))
        >>> found = hooked(new, {"weight_g": torch.ones(1, 1), "weight_v": torch.ones(1, 2), "more": 1})
        >>> [*found.values]
        ['parametrizations.weight.original0', 'parametrizations.weight.original1', 'more']
        >>> sorted(found.replaced)
        ['weight_g', 'weight_v']
    """
    own = module.state_dict().keys()
    if own == state.keys() or not any(map(_has_hooks, module.modules())):
        return Hooked(state)
    seen: dict[str, Any] = {}
    # A hook may write to a tensor in place.
    tried = OrderedDict((key, value.clone() if torch.is_tensor(value) else value) for key, value in state.items())
    originals = {id(value): state[key] for key, value in tried.items()}
    tried._metadata = getattr(state, "_metadata", None)  # type: ignore[attr-defined]
    try:
        trial = _without_memory(module)
        for inner in trial.modules():
            inner._register_load_state_dict_pre_hook(_Recorder(seen), with_module=True)  # type: ignore[no-untyped-call]
        left = trial.load_state_dict(tried, strict=False).unexpected_keys
    except Exception:  # A module that cannot be copied, or that refuses the state: the names are compared as they are.
        return Hooked(state)
    seen = {key: originals.get(id(value), value) for key, value in seen.items()}
    values = {key: state.get(key, seen.get(key)) for key in own if key in state or key in seen}
    others = {key: value for key, value in state.items() if key not in own}
    return Hooked(values | {key: others[key] for key in left if key in others}, frozenset(others.keys() - set(left)))


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._load_state_dict_pre_hooks) or any(
        getattr(type(module), name) is not getattr(nn.Module, name)
        for name in ("_load_from_state_dict", "load_state_dict")
    )


def _without_memory(module: nn.Module) -> nn.Module:
    """Return a copy whose tensors have shapes alone."""
    memo: dict[int, Any] = {}
    others = (one for inner in module.modules() for one in vars(inner).values() if torch.is_tensor(one) and one.is_leaf)
    for tensor in (*module.parameters(), *module.buffers(), *others):
        if torch.nn.parameter.is_lazy(tensor) or tensor.numel() <= _LARGE:
            continue
        shape = tensor.detach().to("meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(shape, requires_grad=tensor.requires_grad) if is_parameter else shape
    return copy.deepcopy(module, memo)


class _Recorder:
    """The last hook of each module: notes the values that the module takes, which then are of no more use."""

    def __init__(self, seen: MutableMapping[str, Any]) -> None:
        self._seen = seen

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        persistent = {
            name: value for name, value in module._buffers.items() if name not in module._non_persistent_buffers_set
        }
        for name, own in (*module._parameters.items(), *persistent.items()):
            if own is not None and f"{prefix}{name}" in state:
                self._seen[f"{prefix}{name}"] = state[f"{prefix}{name}"]
                state[f"{prefix}{name}"] = own  # It fits, so that the trial goes on.
