"""Weights to start from: loads them from any checkpoint into a module, name by name."""

from __future__ import annotations

import functools
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import nn

from checkpointer import HMACKey, Policy
from checkpointer._display import some_of
from checkpointer.errors import MismatchError, RestoreError, warn
from checkpointer.formats.inspection.find_weights import Weights, weights_for
from checkpointer.formats.inspection.memory_state import StateContents
from checkpointer.formats.inspection.tensors import Tensors
from checkpointer_torch.object_parts import ModulePart
from checkpointer_torch.open_any import Opener
from checkpointer_torch.state_differences import Differences, compared

KeyMap = Mapping[str, str | None] | Callable[[str], str | None]


@attrs.frozen(kw_only=True)
class LoadedWeights:
    """The names that were loaded, and the differences."""

    source: str
    """The checkpoint's path or URL."""
    loaded: tuple[str, ...]
    """Names in the module."""
    differences: Differences
    """Names that did not fit; always empty if ``strict``."""


def load_weights(
    module: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Any],
    which: str | int | None = None,
    *,
    key_map: KeyMap | None = None,
    part: str | None = None,
    strict: bool = True,
    policy: Policy | None = None,
    run: str | None = None,
    trust: HMACKey | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> LoadedWeights:
    """Load weights, and nothing else, from any checkpoint into a module.

    The source may be a directory or a file of this library, a Lightning checkpoint, a Hugging Face directory
    (safetensors or ``.bin``, in one file or in shards, adapters too), a safetensors file, or a file that any version
    of ``torch.save`` wrote, whole modules included. Nothing is unpickled: tensors are read as bytes, and other objects
    in the file are left alone. The weights are found by names *and* shapes. A prefix that all names have in common,
    such as Lightning's ``model.``, is found too; so are wrappers around the module.

    Args:
        module: The module that takes the weights.
        source: A path or URL, or a state that was read already.
        which: For a directory of this library: None or ``"last"``, ``"best"`` (with ``policy``), a name, a step.
        key_map: Names in the checkpoint to names in the module: by name, by prefix (``"encoder."``), or a function;
            a name that becomes None is left out.
        part: Where the weights are, if several sets of them fit: a key such as ``"ema"``, keys joined by dots such as
            ``"state_dict.encoder"``, or a file of a folder.
        strict: Whether all of the module must be there and fit, and nothing be left over; False warns.
        policy: Defines ``"best"``.
        run: For a directory of several runs: the id of the one that is meant; None takes the newest.
        trust: The key that signed the directory.
        storage_options: Options of fsspec for the URL.

    Returns:
        The names that were loaded, and those that did not fit.

    Raises:
        MismatchError: If it does not fit, or if several sets of weights do, which are named; nothing was loaded.
        RestoreError: If the checkpoint does not exist, or cannot be read.

    Example:
        >>> import torch
        >>> head = torch.nn.Linear(2, 1)
        >>> loaded = load_weights(head, {"state_dict": {"net.weight": torch.ones(1, 2), "net.bias": torch.ones(1)}})
        >>> loaded.loaded, head.bias.item()
        (('weight', 'bias'), 1.0)
    """
    opener = Opener(which=which, policy=policy, run=run, trust=trust, storage_options=storage_options)
    return picked_weights(module, source, opener, key_map=key_map, part=part, strict=strict).put()


@attrs.frozen(kw_only=True)
class PickedWeights:
    """Weights that were read for a module, and are not in it yet."""

    target: ModulePart
    state: OrderedDict[str, Any]
    loaded: Sequence[str]
    """Names in the module."""
    differences: Differences
    source: str
    num_wanted: int

    def put(self) -> LoadedWeights:
        """Load them into the module."""
        self.target.put(self.state)
        if self.differences:
            counts = f"{len(self.loaded)} of {self.num_wanted} names were loaded"
            msg = f"{self.source} does not fit, and {counts}: {self.differences}"
            warn(msg)
        return LoadedWeights(source=self.source, loaded=tuple(self.loaded), differences=self.differences)


def picked_weights(
    module: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Any],
    opener: Opener,
    *,
    key_map: KeyMap | None = None,
    part: str | None = None,
    strict: bool = True,
) -> PickedWeights:
    """Read the weights that `load_weights` loads, with its arguments and errors. The module stays as it is."""
    target = ModulePart(module)
    own = target.take()
    pick = functools.partial(_picked, target=target, own=own, part=part, key_map=key_map, strict=strict)
    if isinstance(source, Mapping):
        (state, loaded, differences), where = pick(StateContents(source), "the state"), "the state"
    else:
        make = functools.partial(pick, where=os.fspath(source))
        (state, loaded, differences), where = attrs.evolve(opener, make=make).open(source)
    return PickedWeights(
        target=target, state=state, loaded=loaded, differences=differences, source=where, num_wanted=len(own)
    )


def _picked(
    contents: Tensors,
    where: str,
    *,
    target: ModulePart,
    own: Mapping[str, Any],
    part: str | None,
    key_map: KeyMap | None,
    strict: bool,
) -> tuple[OrderedDict[str, Any], list[str], Differences]:
    """Pick the module's weights out of a payload, and read those alone."""
    if unmade := [key for key, value in own.items() if isinstance(value, torch.Tensor) and value.is_meta]:
        msg = (
            f"the module has {some_of(unmade, 3)} on the meta device, without memory to load into, and nothing was "
            "loaded; call module.to_empty(device=...) first"
        )
        raise MismatchError(msg)
    try:
        found = weights_for(contents, _wanted(own), part, rename=lambda key: _renamed(key, key_map))
    except RestoreError as error:
        msg = f"{where}: {error}"
        raise MismatchError(msg) from error
    # Tensors without memory stand in for those that are there.
    there: OrderedDict[str, Any] = OrderedDict(
        (name, torch.empty(info.shape, device="meta")) for name, info in found.tensors.items()
    )
    there |= {name: value for name, value in found.values.items() if name in own and value is not None}
    there._metadata = found.versions  # type: ignore[attr-defined]
    seen = target.hooked(there)
    differences = _without_optional(compared(own, seen.values), own, found)
    taken = there.keys() | (seen.values.keys() if seen.replaced else ())
    loaded = [key for key in own if key in taken and key in seen.values and key not in differences.reshaped]
    if not loaded:
        msg = (
            f"{where} is of another model: nothing of it fits. It has {some_of(list(found.tensors), 3)}; wanted "
            f"are {some_of(list(own), 3)}. Pass key_map= to rename its names"
        )
        raise MismatchError(msg)
    if differences and strict:
        msg = f"{where} does not fit, and nothing was loaded: {differences}. Use key_map=, part= or strict=False"
        raise MismatchError(msg)
    names = [key for key in there if key in seen.replaced or key in loaded]
    state = OrderedDict((key, found.read(key) if key in found.tensors else there[key]) for key in names)
    state._metadata = found.versions  # type: ignore[attr-defined]
    return state, loaded, differences


def _wanted(own: Mapping[str, Any]) -> list[dict[str, tuple[int, ...] | None]]:
    """Return the tensors that the module has, each with all of its names."""
    wanted: dict[Any, dict[str, tuple[int, ...] | None]] = {}
    for key, value in own.items():
        if isinstance(value, torch.Tensor):
            shape = None if torch.nn.parameter.is_lazy(value) else tuple(value.shape)
            wanted.setdefault(_memory(value) or key, {})[key] = shape
    return list(wanted.values())


def _renamed(key: str, key_map: KeyMap | None) -> str | None:
    if not isinstance(key_map, Mapping):
        return key_map(key) if key_map else key
    starts = [start for start in key_map if start == key or (start.endswith(".") and key.startswith(start))]
    if not starts:
        return key
    longest = max(starts, key=len)
    instead = key_map[longest]
    return None if instead is None else instead + key.removeprefix(longest)


def _without_optional(differences: Differences, own: Mapping[str, Any], found: Weights) -> Differences:
    """Drop missing names that are not needed: tied names of tensors that are there, and counters of newer versions."""
    there = {_memory(value) for key, value in own.items() if key not in differences.missing} - {None}

    def is_new(key: str) -> bool:  # Torch loads weights without these counters too.
        module, _, name = key.rpartition(".")
        version = found.versions.get(module, {}).get("version")
        return name == "num_batches_tracked" and (version is None or version < 2)

    missing = tuple(key for key in differences.missing if _memory(own[key]) not in there and not is_new(key))
    return attrs.evolve(differences, missing=missing)


def _memory(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or torch.nn.parameter.is_lazy(value) or not value.data_ptr():
        return None
    return value.data_ptr(), tuple(value.shape), value.stride()
