"""Averages the weights of several checkpoints, tensor by tensor."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

import attrs

from checkpointer.errors import RestoreError
from checkpointer.formats.inspection.find_weights import Weights, weights_of

__all__ = ["Weights", "average", "weights_of"]

_PARAMETRISED: Final = (
    (re.compile(r"(.+)_g"), r"\1_v", "weight normalisation keeps a weight as length and direction"),
    (re.compile(r"(.+)_orig"), r"\1_u", "spectral normalisation keeps a weight before it is divided by its norm"),
    (re.compile(r"(.+)_orig"), r"\1_mask", "pruning keeps a weight before it is masked"),
)
"""Names that belong together, and why the means of each are not the mean of the weight."""


def average(sources: Sequence[tuple[str, Weights]]) -> Weights:
    """Return the mean of several weights, computed when each tensor is read: memory is about five times its own.

    Floating-point and complex tensors are averaged in double precision and rounded once; counters and masks are those
    of the first. The mean of several weights of one training is often better than each of them.

    Args:
        sources: Weights, each with a name for messages, at least one.

    Raises:
        RestoreError: If one has other tensors than the first; or if a tensor is not made of numbers whose mean means
            something: it is sparse, quantised, of packed bits, or one of several that make a weight together.

    Example:
        >>> import torch
        >>> from checkpointer.formats.inspection.tensors import TensorInfo
        >>> info = TensorInfo(name="w", dtype="float32", shape=(2,))
        >>> ones = Weights(tensors={"w": info}, read=lambda name: torch.ones(2))
        >>> threes = Weights(tensors={"w": info}, read=lambda name: 3 * torch.ones(2))
        >>> average([("a", ones), ("b", threes)]).read("w")
        tensor([2., 2.])
    """
    _, first = sources[0]
    for name, other in sources[1:]:
        _check_same(sources[0][0], first, name, other)
    _check_numbers(sources[0][0], first)
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


def _check_numbers(source: str, weights: Weights) -> None:
    for name, info in weights.tensors.items():
        why = _parametrised(name, weights) if info.is_numbers else f"is {info.kind}, and torch cannot compute its mean"
        if why:
            msg = (
                f"{name} in {source} {why}; average checkpoints of plain weights, as remove_parametrizations, "
                "remove_weight_norm, dequantize() or to_dense() make them, or another part of the checkpoint"
            )
            raise RestoreError(msg)


def _parametrised(name: str, weights: Weights) -> str:
    """Return why a tensor is not a weight by itself; empty if it is one."""
    if ".parametrizations." in f".{name}".rpartition(".")[0]:
        return "is a part of a parametrised weight, and the mean of the parts is not the mean of the weight"
    for pattern, other, why in _PARAMETRISED:
        match = pattern.fullmatch(name)
        partner = weights.tensors.get(match.expand(other)) if match else None
        if partner is not None and (
            pattern is not _PARAMETRISED[0][0] or _is_length(weights.tensors[name].shape, partner.shape)
        ):
            return f"and {partner.name} make one weight: {why}, so their means are not its mean"
    return ""


def _is_length(length: tuple[int, ...], direction: tuple[int, ...]) -> bool:
    """Return whether the first is a length for each row of the second, or one for all."""
    if len(length) != len(direction) or length == direction:
        return not length
    return all(one in (1, other) for one, other in zip(length, direction, strict=True))


def _mean(name: str, sources: Sequence[Weights]) -> Any:
    import torch

    total = sources[0].read(name)
    if not (total.is_floating_point() or total.is_complex()):
        return total
    dtype = total.dtype
    total = total.to(torch.complex128 if total.is_complex() else torch.float64, copy=True)
    for source in sources[1:]:
        total += source.read(name).to(total.dtype)
    return total.div_(len(sources)).to(dtype)
