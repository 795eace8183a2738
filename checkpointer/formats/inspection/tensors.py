"""What a payload holds, tensor by tensor: names, shapes and dtypes first, and the values of one when asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final, Protocol

import attrs

from checkpointer.formats.inspection.weight_sets import Part

__all__ = ["ITEM_SIZES", "OPAQUE", "PACKED", "TensorInfo", "Tensors", "numel_of"]

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
    "bits8": 1,
    "bits16": 2,
    "bits1x8": 1,
    "bits2x4": 1,
    "bits4x2": 1,
}
"""Bytes of one element, by the name torch gives the dtype."""
PACKED: Final = {"quint4x2": 2, "quint2x4": 4}
"""Elements in one byte, for dtypes that torch packs along the last dimension."""
_QUANTISED: Final = ("qint8", "quint8", "qint32", "quint4x2", "quint2x4")
OPAQUE: Final = ("float4_e2m1fn_x2", "bits8", "bits16", "bits1x8", "bits2x4", "bits4x2")
"""Dtypes that torch stores, and cannot compute with."""


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
    layout: str = "strided"
    """As torch names it, such as ``"sparse_coo"``."""

    @property
    def is_dense(self) -> bool:
        """Whether its bytes are its elements, one after the other: it is neither sparse nor quantised."""
        return self.layout == "strided" and self.dtype not in _QUANTISED

    @property
    def is_numbers(self) -> bool:
        """Whether torch can compute with its elements as numbers."""
        return self.is_dense and self.dtype not in OPAQUE

    @property
    def kind(self) -> str:
        """What to call it: its dtype, and its layout if that is not the usual one."""
        return self.dtype if self.layout == "strided" else f"{self.dtype} {self.layout}"

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return numel_of(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of its elements; tensors that share memory count each."""
        per_byte = PACKED.get(self.dtype, 1)
        if per_byte > 1 and self.shape:
            return numel_of(self.shape[:-1]) * -(-self.shape[-1] // per_byte)
        return self.numel * ITEM_SIZES.get(self.dtype, 1)


class Tensors(Protocol):
    """An opened payload. Nothing in it runs: not when it is opened, not when it is read."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its name, in the order of the payload."""
        ...

    @property
    def others(self) -> Mapping[str, Any]:
        """Everything but tensors, by name: plain values as they are, objects as a short text in angle brackets."""
        ...

    @property
    def parts(self) -> Mapping[str, Part]:
        """Every set of weights by the dotted path to it, in the order of the payload: see `Part`."""
        ...

    @property
    def calls(self) -> tuple[str, ...]:
        """What an ordinary unpickler would import and call, beyond what tensors and plain containers need."""
        ...

    def problems(self) -> Iterable[str]:
        """Return a message for each tensor whose bytes are not all there."""
        ...

    def read(self, name: str) -> Any:
        """Return one tensor, on the CPU. Memory: that tensor's own.

        Raises:
            CorruptError: If its bytes are not there.
        """
        ...

    def value(self, name: str) -> Any:
        """Return one of ``others`` as plain data; None if it is an object that only unpickling would make."""
        ...

    def close(self) -> None:
        """Close the files."""
        ...
