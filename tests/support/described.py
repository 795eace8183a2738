"""Descriptions of states, to compare a saved state with the restored one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

__all__ = ["Described"]


class Described:
    """A state's types, values and strides, and which objects and storages are shared."""

    def __init__(self, state: Any) -> None:
        self._storages: dict[int, int] = {}
        self._objects: dict[int, int] = {}
        self._kept: list[Any] = []
        self.parts = self._parts(state)

    def _parts(self, value: Any) -> Any:
        if isinstance(value, (int, float, str, bytes, type(None), torch.Size, torch.dtype)):
            return type(value).__name__, hex(value) if type(value) is int else repr(value)
        if id(value) in self._objects:
            return ("the same as", self._objects[id(value)])
        self._objects[id(value)] = len(self._objects)
        self._kept.append(value)
        kind = type(value).__name__
        if isinstance(value, torch.Tensor) and value.is_nested:
            return kind, [self._parts(part) for part in value.unbind()]
        if isinstance(value, torch.Tensor):
            return kind, self._tensor(value), self._parts(dict(value.__dict__))
        if isinstance(value, np.ndarray):
            return kind, value.dtype, value.tolist(), value.flags.f_contiguous
        if isinstance(value, dict):
            return kind, [(self._parts(key), self._parts(item)) for key, item in value.items()]
        if isinstance(value, (list, tuple)):
            return kind, [self._parts(item) for item in value]
        if isinstance(value, (set, frozenset)):
            return kind, sorted(repr(self._parts(item)) for item in value)
        return kind, self._parts(vars(value)) if hasattr(value, "__dict__") else str(value)

    def _tensor(self, tensor: torch.Tensor) -> Any:
        whole = (tensor.dtype, tensor.layout, tuple(tensor.shape), tensor.requires_grad, tensor.is_conj())
        if tensor.is_meta:
            return *whole, tensor.stride(), "meta"
        if tensor.layout == torch.sparse_coo:
            return *whole, self._tensor(tensor._indices()), self._tensor(tensor._values()), tensor.is_coalesced()
        if tensor.layout != torch.strided:
            return *whole, str(tensor)
        if tensor.is_quantized:
            return *whole, str(tensor), tensor.int_repr().tolist(), tensor.stride()
        storage = tensor.untyped_storage()
        self._kept.append(storage)
        first = storage._cdata not in self._storages
        number = self._storages.setdefault(storage._cdata, len(self._storages))
        content = bytes(storage.tolist()) if first else b""  # type: ignore[no-untyped-call]
        return *whole, tensor.stride(), tensor.storage_offset(), number, content
