"""What a payload holds, tensor by tensor: names, shapes and dtypes first, and the values of one when asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final, Protocol

import attrs

__all__ = ["ITEM_SIZES", "TensorInfo", "Tensors", "numel_of"]

ITEM_SIZES: Final = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "complex128": 16,
    "complex64": 8,
    "complex32": 4,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint64": 8,
    "uint32": 4,
    "uint16": 2,
    "uint8": 1,
    "bool": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "qint8": 1,
    "quint8": 1,
    "qint32": 4,
    "quint4x2": 1,
    "quint2x4": 1,
    "float4_e2m1fn_x2": 1,
}
"""Bytes of one element, by the name torch gives the dtype."""


def numel_of(shape: tuple[int, ...]) -> int:
    """Return how many elements a tensor of this shape has."""
    return math.prod(shape)


@attrs.frozen(kw_only=True)
class TensorInfo:
    """What is known of a tensor before a byte of it is read."""

    name: str
    """Its keys, joined by dots, such as ``"model.0.weight"``."""
    dtype: str
    """As torch names it, such as ``"float32"``."""
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return numel_of(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of its elements; tensors that share memory count each."""
        return self.numel * ITEM_SIZES.get(self.dtype, 1)


class Tensors(Protocol):
    """An opened payload. Nothing in it runs: not when it is opened, not when it is read."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its name, in the order of the payload."""
        ...

    @property
    def others(self) -> Mapping[str, Any]:
        """What is no tensor, by name: plain values as they are, objects as a few words in angle brackets."""
        ...

    @property
    def calls(self) -> tuple[str, ...]:
        """What an ordinary unpickler would import and call, beyond what tensors and plain containers need."""
        ...

    def problems(self) -> Iterable[str]:
        """Return what is wrong with tensors whose bytes are not all there, in words."""
        ...

    def read(self, name: str) -> Any:
        """Return one tensor, on the CPU. Memory: that tensor's own.

        Raises:
            CorruptError: If its bytes are not there.
        """
        ...

    def close(self) -> None:
        """Close the files."""
        ...
