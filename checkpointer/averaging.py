"""Averages the weights of several checkpoints, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import attrs

from checkpointer.errors import RestoreError
from checkpointer.formats.tensors import TensorInfo, Tensors

__all__ = ["Weights", "average", "weights_of"]

_MODELS: Final = ("model", "state_dict", "model_state_dict", "module", "weights", "net", "network")
"""The keys under which trainers and people keep the weights of the model."""
_BESIDE: Final = ("optim", "sched", "rng", "loops", "callbacks", "scaler", "ema", "sampler", "random")


@attrs.frozen(kw_only=True)
class Weights:
    """Tensors by name, and how to get each."""

    tensors: Mapping[str, TensorInfo]
    read: Callable[[str], Any]
    """Returns one by its name."""
    prefix: str = ""
    """The part of the payload that they are of; empty for all of it."""


def weights_of(contents: Tensors, prefix: str | None = None) -> Weights:
    """Return the weights of a payload, under the names that the model knows them by.

    Args:
        contents: The payload, from `checkpointer.formats.contents.open_contents`.
        prefix: The key they are under, such as ``"model"``; ``""`` takes every tensor. None finds it, if only one key
            is one that models are usually kept under, or there are no other tensors.

    Raises:
        RestoreError: If there is no such key, or which one it is cannot be told.

    Example:
        >>> import io, torch
        >>> from checkpointer.formats.torch_contents import open_zip
        >>> stream = io.BytesIO()
        >>> torch.save({"model": {"w": torch.ones(2)}, "optimizer": {"m": torch.ones(2)}}, stream)
        >>> weights = weights_of(open_zip(stream))
        >>> weights.prefix, list(weights.tensors)
        ('model', ['w'])
    """
    tops = dict.fromkeys(name.partition(".")[0] for name in contents.tensors)
    if prefix is None:
        prefix = _found(tops)
    inside = {name: name for name in contents.tensors} if not prefix else _below(contents, prefix)
    if not inside:
        have = ", ".join(tops) or "none"
        msg = f"there is no tensor under {prefix!r}; the payload's keys are: {have}"
        raise RestoreError(msg)
    tensors = {name: attrs.evolve(contents.tensors[full], name=name) for name, full in inside.items()}
    return Weights(tensors=tensors, read=lambda name: contents.read(inside[name]), prefix=prefix)


def _below(contents: Tensors, prefix: str) -> dict[str, str]:
    # A folder's files are told apart by a colon.
    starts = (f"{prefix}.", f"{prefix}: ")
    return {name[len(s) :]: name for name in contents.tensors for s in starts if name.startswith(s)}


def _found(tops: Iterable[str]) -> str:
    tops = list(tops)
    models = [top for top in tops if top in _MODELS]
    if len(models) == 1:
        return models[0]
    files = {top for top in tops if top.endswith(("safetensors: ", "bin: "))}
    if not models and not files and not any(top.lower().startswith(_BESIDE) for top in tops):
        return ""
    msg = (
        f"which key holds the weights? The payload has: {', '.join(tops) or 'no tensor'}; pass its name, or '' for all"
    )
    raise RestoreError(msg)


def average(sources: Sequence[tuple[str, Weights]]) -> Weights:
    """Return the mean of several weights, computed when each tensor is read: memory is about five times its own.

    Floating-point and complex tensors are averaged in double precision and rounded once; counters and masks are those
    of the first. The mean of weights that one training went through often does better than each of them.

    Args:
        sources: Weights, each with a name for messages, at least one.

    Raises:
        RestoreError: If one has other tensors than the first.

    Example:
        >>> import torch
        >>> info = TensorInfo(name="w", dtype="float32", shape=(2,))
        >>> ones = Weights(tensors={"w": info}, read=lambda name: torch.ones(2))
        >>> threes = Weights(tensors={"w": info}, read=lambda name: 3 * torch.ones(2))
        >>> average([("a", ones), ("b", threes)]).read("w")
        tensor([2., 2.])
    """
    _, first = sources[0]
    for name, other in sources[1:]:
        _check_same(sources[0][0], first, name, other)
    return attrs.evolve(first, read=lambda name: _mean(name, [weights for _, weights in sources]))


def _check_same(name: str, first: Weights, other_name: str, other: Weights) -> None:
    for key in dict.fromkeys((*first.tensors, *other.tensors)):
        one, two = first.tensors.get(key), other.tensors.get(key)
        if one is None or two is None:
            msg = f"{name if one is None else other_name} has no {key!r}; average checkpoints of one model"
            raise RestoreError(msg)
        if (one.dtype, one.shape) != (two.dtype, two.shape):
            msg = f"{key} is {one.dtype} {list(one.shape)} in {name}, {two.dtype} {list(two.shape)} in {other_name}"
            raise RestoreError(msg)


def _mean(name: str, sources: Sequence[Weights]) -> Any:
    import torch

    total = sources[0].read(name)
    if not (total.is_floating_point() or total.is_complex()):
        return total
    dtype = total.dtype
    total = total.to(torch.complex128 if total.is_complex() else torch.float64, copy=True)
    for source in sources[1:]:
        total += source.read(name)
    return total.div_(len(sources)).to(dtype)
