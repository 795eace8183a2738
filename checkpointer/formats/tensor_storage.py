"""Which bytes of its storage a tensor needs, and whether the storage has them."""

from __future__ import annotations

from typing import Any

from checkpointer.errors import SaveError


class CutStorageError(SaveError):
    """Raised if a tensor needs more bytes than its storage has."""


def cut(needed: int, size: int, what: str = "a tensor") -> CutStorageError:
    """Return the error for a tensor that needs so many bytes of a storage of ``size`` bytes."""
    msg = (
        f"{what} needs {needed} bytes of a storage that has {size}: the storage was freed or cut (resize_), and a load "
        "would refuse it; give it its memory back before a save"
    )
    return CutStorageError(msg)


def check_stored(tensor: Any, path: str = "a tensor") -> None:
    """Raise `CutStorageError` if the storage of a tensor was freed or cut."""
    import torch

    kind: Any = type(tensor)
    if kind is torch.Tensor or kind is torch.nn.Parameter:
        _check(tensor, path)
    elif kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__:  # Others have their bytes elsewhere.
        with torch._C.DisableTorchFunctionSubclass():
            _check(tensor, path)


def _check(tensor: Any, path: str) -> None:
    import torch

    is_packed = tensor.is_quantized  # Two numbers may lie in one byte.
    if is_packed or tensor.is_nested or tensor.layout is not torch.strided or not (tensor.is_cpu or tensor.is_cuda):
        return
    has, count = tensor.untyped_storage().nbytes(), tensor.numel()
    if (tensor.storage_offset() + count) * tensor.itemsize <= has and tensor.is_contiguous():
        return
    needed = span(tensor)[1] if count and not tensor._is_zerotensor() else 0
    if needed > has:
        raise cut(needed, has, path)


def span(tensor: Any) -> tuple[int, int]:
    """Return the first byte of a tensor with elements in its storage, and the byte after its last one."""
    last = sum((count - 1) * stride for count, stride in zip(tensor.size(), tensor.stride(), strict=True))
    first = tensor.storage_offset()
    return first * tensor.itemsize, (first + last + 1) * tensor.itemsize
