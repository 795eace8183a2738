"""What differs between two payloads, tensor by tensor, with two tensors in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final, Literal

import attrs

from checkpointer.formats.tensors import TensorInfo, Tensors

__all__ = ["Change", "diff", "diff_values"]

_CHUNK: Final = 1 << 20
"""Elements that are compared at once, in double precision."""

Kind = Literal["same", "changed", "reshaped", "added", "removed"]


@attrs.frozen(kw_only=True)
class Change:
    """What became of one tensor."""

    name: str
    kind: Kind
    before: TensorInfo | None = None
    after: TensorInfo | None = None
    norm: float = 0.0
    """Euclidean norm of the difference."""
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
        before: One payload, from `checkpointer.formats.contents.open_contents`.
        after: The other.
        match: Only tensors whose name contains this.

    Yields:
        A `Change` for each tensor, also for those that are the same.

    Example:
        >>> import io, torch
        >>> from checkpointer.formats.torch_contents import open_zip
        >>> def opened(state):
        ...     stream = io.BytesIO()
        ...     torch.save(state, stream)
        ...     return open_zip(stream)
        >>> (change,) = diff(opened({"w": torch.zeros(4)}), opened({"w": torch.ones(4)}))
        >>> change.kind, change.norm, change.max
        ('changed', 2.0, 1.0)
    """
    for name in dict.fromkeys((*before.tensors, *after.tensors)):
        if match in name:
            yield _change(name, before, after)


def diff_values(before: Tensors, after: Tensors, match: str = "") -> dict[str, tuple[Any, Any]]:
    """Return what is no tensor and differs, before and after; None where it is not there.

    Example:
        >>> from checkpointer.formats.torch_contents import TorchContents
        >>> before, after = (TorchContents(None, {"lr": lr, "seed": 7}, {}) for lr in (0.1, 0.2))
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
    measured = _measure(before.read(name), after.read(name))
    is_same = measured["norm"] == 0 and one.dtype == other.dtype
    return Change(name=name, kind="same" if is_same else "changed", before=one, after=other, **measured)


def _measure(before: Any, after: Any) -> dict[str, float]:
    a, b = _flat(before), _flat(after)
    change = length = other = product = largest = 0.0
    for start in range(0, a.numel(), _CHUNK):
        x, y = a[start : start + _CHUNK], b[start : start + _CHUNK]
        x, y, is_same = x.double(), y.double(), x.dtype == y.dtype and x.equal(y)
        squares = x.dot(x).item()
        length += squares
        if is_same:
            other, product = other + squares, product + squares
            continue
        other, product = other + y.dot(y).item(), product + x.dot(y).item()
        delta = _difference(x, y)
        change += delta.dot(delta).item()
        biggest = delta.abs_().max().item()
        largest = biggest if math.isnan(biggest) or biggest > largest else largest
    return {
        "norm": math.sqrt(change),
        "relative": math.sqrt(change / length) if length else (math.inf if change else 0.0),
        "max": largest,
        "cosine": product / math.sqrt(length * other) if length and other else (0.0 if change else 1.0),
    }


def _difference(x: Any, y: Any) -> Any:
    delta = y - x
    if not delta.sum().isfinite():
        # What is NaN or infinite in both did not change.
        delta.masked_fill_((x == y) | (x.isnan() & y.isnan()), 0.0)
    return delta


def _flat(tensor: Any) -> Any:
    import torch

    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.detach().reshape(-1)
