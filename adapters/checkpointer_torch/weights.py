"""Weights to start from: out of any checkpoint into a module, name by name."""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import attrs
import torch
from torch import nn

from checkpointer import CheckpointerWarning, HMACKey, Policy
from checkpointer.errors import MismatchError
from checkpointer_torch.differences import Differences, compared
from checkpointer_torch.names import plain_state
from checkpointer_torch.parts import ModulePart
from checkpointer_torch.sources import open_place

__all__ = ["KeyMap", "LoadedWeights", "load_weights"]

KeyMap = Mapping[str, str | None] | Callable[[str], str | None]
_USUAL: Final = ("model", "state_dict", "model_state_dict", "module", "weights")
"""Where weights usually lie in a larger state; of two that fit alike the first counts."""


@attrs.frozen(kw_only=True)
class LoadedWeights:
    """What was loaded, and what was not."""

    source: str
    """The checkpoint's path or URL."""
    loaded: tuple[str, ...]
    """Names in the module."""
    differences: Differences
    """What did not fit; nothing if ``strict``."""


def load_weights(
    module: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Any],
    which: str | int | None = None,
    *,
    key_map: KeyMap | None = None,
    part: str | None = None,
    strict: bool = True,
    policy: Policy | None = None,
    trust: HMACKey | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> LoadedWeights:
    """Load weights, and nothing else, from any checkpoint into a module.

    The source may be a directory or a file of this library, a Lightning checkpoint, a Hugging Face directory
    (safetensors or ``.bin``, in one file or in shards), a safetensors file, or whatever ``torch.save`` wrote of
    tensors. Nothing is unpickled but tensors and plain data. A prefix that all names have in common, such as
    Lightning's ``model.``, is found by itself; so are wrappers around the module.

    Args:
        module: Where the weights go.
        source: A path or URL, or a state that was read already.
        which: Of a directory of this library: None or ``"last"``, ``"best"`` (with ``policy``), a name, a step.
        key_map: Names in the checkpoint to names in the module: by name, by prefix (``"encoder."``), or a function;
            a name that becomes None is left out.
        part: The key under which the weights lie, if the checkpoint holds several.
        strict: Whether all of the module must be there and fit, and nothing be left over; False warns.
        policy: Says what ``"best"`` means.
        trust: The key that signed the directory.
        storage_options: What fsspec needs besides the URL.

    Returns:
        What was loaded, and what did not fit.

    Raises:
        MismatchError: If it does not fit; nothing was loaded.
        RestoreError: If there is no such checkpoint, or it cannot be read safely.

    Example:
        >>> import torch
        >>> head = torch.nn.Linear(2, 1)
        >>> loaded = load_weights(head, {"state_dict": {"net.weight": torch.ones(1, 2), "net.bias": torch.ones(1)}})
        >>> loaded.loaded, head.bias.item()
        (('weight', 'bias'), 1.0)
    """
    if isinstance(source, Mapping):
        state, where = source, "the state"
    else:
        found = open_place(source, which, policy=policy, trust=trust, storage_options=storage_options)
        state, where = found.state, found.where
    target = ModulePart(module)
    own = plain_state(module)
    weights = _chosen(state, part, own, key_map, where)
    differences = _without_tied(compared(own, weights), own)
    loaded = tuple(key for key in own if key in weights and key not in differences.reshaped)
    if not loaded:
        msg = (
            f"{where} is of another model: nothing of it fits. It has {_some(weights)}; wanted are {_some(own)}. "
            "Say with key_map= which name becomes which"
        )
        raise MismatchError(msg)
    if differences and strict:
        msg = f"{where} does not fit, and nothing was loaded: {differences}. Use key_map=, or strict=False"
        raise MismatchError(msg)
    target.put(weights)
    if differences:
        msg = f"{where} does not fit, and {len(loaded)} of {len(own)} names were loaded: {differences}"
        warnings.warn(msg, CheckpointerWarning, stacklevel=2)
    return LoadedWeights(source=where, loaded=loaded, differences=differences)


def _chosen(state: Any, part: str | None, own: Mapping[str, Any], key_map: KeyMap | None, where: str) -> Any:
    """Return the weights that fit best, under the module's names where they have them."""
    parts = _parts(state)
    if part is not None:
        if not isinstance(state, Mapping) or part not in state:
            msg = f"{where} has no part {part!r} (have: {', '.join(map(str, state)) if state else 'nothing'})"
            raise MismatchError(msg)
        parts = {part: state[part]} if _is_weights(state[part]) else {}
    if not parts:
        msg = f"{where} holds no weights: no mapping of names to tensors was found in {_described(state)}"
        raise MismatchError(msg)
    named = {key: _without_prefix(_mapped(weights, key_map), own) for key, weights in parts.items()}
    usual = [*(key for key in _USUAL if key in named), *(key for key in named if key not in _USUAL)]
    return max((named[key] for key in usual), key=lambda weights: _fitting(own, weights))


def _parts(state: Any) -> dict[str, Any]:
    if _is_weights(state):
        return {"": state}
    if not isinstance(state, Mapping):
        return {}
    return {str(key): value for key, value in state.items() if _is_weights(value)}


def _is_weights(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and any(isinstance(item, torch.Tensor) for item in value.values())
        and all(isinstance(key, str) for key in value)
        and not any(isinstance(item, (Mapping, list, tuple)) for item in value.values())
    )


def _mapped(weights: Mapping[str, Any], key_map: KeyMap | None) -> OrderedDict[str, Any]:
    named: OrderedDict[str, Any] = OrderedDict()
    for key, value in weights.items():
        name = _renamed(key, key_map)
        if name is None:
            continue
        if name in named:
            msg = f"key_map makes {name!r} of {key!r} and of another name"
            raise MismatchError(msg)
        named[name] = value
    if key_map is None:
        named._metadata = getattr(weights, "_metadata", {})  # type: ignore[attr-defined]
    return named


def _renamed(key: str, key_map: KeyMap | None) -> str | None:
    if key_map is None:
        return key
    if not isinstance(key_map, Mapping):
        return key_map(key)
    if key in key_map:
        return key_map[key]
    prefixes = [prefix for prefix in key_map if prefix.endswith(".") and key.startswith(prefix)]
    if not prefixes:
        return key
    longest = max(prefixes, key=len)
    instead = key_map[longest]
    return None if instead is None else instead + key.removeprefix(longest)


def _without_prefix(weights: OrderedDict[str, Any], own: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """Take off the prefix under which most of the module's names are found; what lies elsewhere is another's."""
    names = list(own)
    told = {names[0], names[len(names) // 2], names[-1]} if names else set()
    prefixes = {key.removesuffix(name) for key in weights for name in told if key.endswith(f".{name}")}
    best, most = "", _fitting(own, weights)
    for prefix in sorted(prefixes):
        count = sum(prefix + name in weights for name in own)
        if count > most:
            best, most = prefix, count
    if not best:
        return weights
    return OrderedDict((key.removeprefix(best), value) for key, value in weights.items() if key.startswith(best))


def _fitting(own: Mapping[str, Any], weights: Mapping[str, Any]) -> int:
    return sum(key in weights for key in own)


def _without_tied(differences: Differences, own: Mapping[str, Any]) -> Differences:
    """Drop from what is missing a name whose tensor is also known under one that is there."""
    missing = set(differences.missing)
    there = {_memory(value) for key, value in own.items() if key not in missing} - {None}
    still = tuple(key for key in differences.missing if _memory(own[key]) not in there)
    return attrs.evolve(differences, missing=still)


def _memory(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or torch.nn.parameter.is_lazy(value) or not value.data_ptr():
        return None
    return value.data_ptr(), tuple(value.shape), value.stride()


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _described(state: Any) -> str:
    if isinstance(state, Mapping):
        return f"a mapping with the keys {_some(map(str, state))}"
    return f"a {type(state).__name__}"
