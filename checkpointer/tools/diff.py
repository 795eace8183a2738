"""Compares two payloads tensor by tensor, with two tensors in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final, Literal

import attrs

from checkpointer.errors import RestoreError, reading
from checkpointer.formats.inspection.pickled_tensors import is_too_large
from checkpointer.formats.inspection.tensors import OPAQUE, TensorInfo, Tensors

_CHUNK: Final = 1 << 20
"""Elements that are compared at once, in double precision."""

_UNKNOWN: Final = dict.fromkeys(("norm", "relative", "max", "cosine"), math.nan)
"""The difference of tensors that torch cannot subtract, such as packed bits."""

Kind = Literal["same", "changed", "reshaped", "added", "removed"]


@attrs.frozen(kw_only=True)
class Change:
    """The change of one tensor."""

    name: str
    kind: Kind
    before: TensorInfo | None = None
    after: TensorInfo | None = None
    norm: float = 0.0
    """Euclidean norm of the difference; NaN if torch cannot compute with the elements."""
    relative: float = 0.0
    """The same, divided by the norm of what was there before; infinite if that was 0."""
    max: float = 0.0
    """Largest absolute difference of two elements; NaN if one of them is NaN and the other is not."""
    cosine: float = 1.0
    """Cosine of the angle between both, as vectors: 1 means the same direction."""

    def __bool__(self) -> bool:
        """Return whether anything changed."""
        return self.kind != "same"


def diff(before: Tensors, after: Tensors, match: str = "") -> Iterator[Change]:
    """Compare two payloads, in the order of the first.

    Args:
        before: One payload, from `checkpointer.formats.inspection.payload.open_contents`.
        after: The other.
        match: Only tensors whose name contains this.

    Yields:
        A `Change` for each tensor, also for those that are the same.

    Example:
        >>> import io, torch
        >>> from checkpointer.formats.inspection.torch_file import open_torch
        >>> def opened(state):
        ...     stream = io.BytesIO()
        ...     torch.save(state, stream)
        ...     return open_torch(stream)
        >>> (change,) = diff(opened({"w": torch.zeros(4)}), opened({"w": torch.ones(4)}))
        >>> change.kind, change.norm, change.max
        ('changed', 2.0, 1.0)
    """
    for name in dict.fromkeys((*before.tensors, *after.tensors)):
        if match in name:
            with reading(name):
                change = _change(name, before, after)
            yield change


def diff_values(before: Tensors, after: Tensors, match: str = "") -> dict[str, tuple[Any, Any]]:
    """Return what differs and is not a tensor, before and after; None where it is not there.

    Example:
        >>> from checkpointer.formats.inspection.memory_state import StateContents
        >>> before, after = (StateContents({"lr": lr, "seed": 7}) for lr in (0.1, 0.2))
        >>> diff_values(before, after)
        {'lr': (0.1, 0.2)}
    """
    names = dict.fromkeys((*before.others, *after.others))
    pairs = {name: (before.others.get(name), after.others.get(name)) for name in names if match in name}
    return {name: (one, other) for name, (one, other) in pairs.items() if repr(one) != repr(other)}


def _change(name: str, before: Tensors, after: Tensors) -> Change:
    one, other = before.tensors.get(name), after.tensors.get(name)
    if one is None or other is None:
        return Change(name=name, kind="added" if one is None else "removed", before=one, after=other)
    if one.shape != other.shape:
        return Change(name=name, kind="reshaped", before=one, after=other)
    is_same, measured = _compared(one, other, before.read(name), after.read(name))
    is_same = is_same and one.dtype == other.dtype
    return Change(name=name, kind="same" if is_same else "changed", before=one, after=other, **measured)


def _compared(one: TensorInfo, other: TensorInfo, before: Any, after: Any) -> tuple[bool, dict[str, float]]:
    """Return whether two tensors hold the same, and by how much they differ."""
    if one.kind != other.kind and not (one.is_numbers and other.is_numbers):
        return False, _UNKNOWN
    if one.dtype in OPAQUE:
        is_same = _bytes(before).equal(_bytes(after))
        return is_same, {} if is_same else _UNKNOWN
    return _measure(_flat(_plain(one, before)), _flat(_plain(other, after)))


def _plain(info: TensorInfo, tensor: Any) -> Any:
    """Return the numbers that a sparse or quantised tensor stands for."""
    if info.layout != "strided":
        if is_too_large(info.bytes, tensor._nnz() * tensor.element_size()):
            msg = f"{info.name} is {info.kind} and would take {info.bytes} bytes when dense; compare it yourself"
            raise RestoreError(msg)
        return tensor.to_dense()
    return tensor if info.is_dense else tensor.dequantize()


def _measure(a: Any, b: Any) -> tuple[bool, dict[str, float]]:
    change = length = other = product = largest = 0.0
    all_same = True
    for start in range(0, a.numel(), _CHUNK):
        raw_x, raw_y = a[start : start + _CHUNK], b[start : start + _CHUNK]
        x, y = raw_x.double(), raw_y.double()
        delta = _difference(raw_x, raw_y, x, y)
        all_same = all_same and not delta.any()
        length, other, product = length + x.dot(x).item(), other + y.dot(y).item(), product + x.dot(y).item()
        change += delta.dot(delta).item()
        biggest = delta.abs_().max().item()
        largest = biggest if math.isnan(biggest) or biggest > largest else largest
    return all_same, {
        "norm": math.sqrt(change),
        "relative": math.sqrt(change / length) if length else (math.inf if change else 0.0),
        "max": largest,
        "cosine": product / math.sqrt(length * other) if length and other else (0.0 if change else 1.0),
    }


def _difference(raw_x: Any, raw_y: Any, x: Any, y: Any) -> Any:
    """Return ``y - x`` in double precision, 0 only where both are the same."""
    import torch

    delta = y - x
    if raw_x.dtype == raw_y.dtype and raw_x.dtype in (torch.int64, torch.uint64):
        # Integers beyond 2 ** 53 are not all doubles. If both have one sign, their difference fits their own type.
        one, two = raw_x.view(torch.int64), raw_y.view(torch.int64)
        return torch.where((one < 0) == (two < 0), (two - one).double(), delta)
    if not delta.sum().isfinite():
        # An element that is NaN or infinite in both did not change.
        delta.masked_fill_((x == y) | (x.isnan() & y.isnan()), 0.0)
    return delta


def _bytes(tensor: Any) -> Any:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _flat(tensor: Any) -> Any:
    import torch

    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.to(torch.complex128) if tensor.dtype == torch.complex32 else tensor)
    return tensor.detach().reshape(-1)
