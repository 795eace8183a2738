"""Reads the tensors in a pickle: dtype, shape, and the bytes of the storages that they are made of."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Final

import attrs

from checkpointer.errors import CorruptError
from checkpointer.formats.inspection.pickle import Call, Global, Persistent
from checkpointer.formats.inspection.pickled_values import args_of
from checkpointer.formats.inspection.tensors import ITEM_SIZES, PACKED

__all__ = ["MAX_EXPANDED_BYTES", "STORAGES", "StorageRef", "Stored", "is_known"]

MAX_EXPANDED_BYTES: Final = 1 << 30
"""A tensor that repeats its memory, or is sparse, is not read if its elements would take more than this."""
STORAGES: Final = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
    "QInt8Storage": "qint8",
    "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32",
    "QUInt4x2Storage": "quint4x2",
    "QUInt2x4Storage": "quint2x4",
}
"""The dtype of each class of storages."""
_SCHEMES: Final = ("per_tensor_affine", "per_channel_affine", "per_channel_affine_float_qparams")
_UNWRAPPED: Final = {
    "_rebuild_parameter",
    "_rebuild_parameter_with_state",
    "_rebuild_device_tensor_from_cpu_tensor",
}
_STRIDED: Final = {"_rebuild_tensor": None, "_rebuild_tensor_v2": 6, "_rebuild_tensor_v3": 7}
"""Functions that make a strided tensor, and the position of the argument with the flags."""

Read = Callable[["StorageRef", int, int], bytearray]
"""Returns bytes of a storage: from where, and how many."""


def is_known(found: Global) -> bool:
    """Return whether it is a name of torch's own for storages, dtypes and rebuilding tensors."""
    if found.module == "torch._utils":
        return found.name.startswith("_rebuild_")
    is_type = found.module in ("torch", "torch.storage") and (
        found.name.endswith("Storage") or found.name in ITEM_SIZES or found.name in _SCHEMES
    )
    return is_type or (found.module, found.name) in (
        ("torch._tensor", "_rebuild_from_type_v2"),
        ("torch.serialization", "_get_layout"),
    )


@attrs.frozen
class StorageRef:
    """The bytes that tensors share."""

    key: str
    dtype: str
    offset: int
    """Of its first element, in elements: storages of old files may be parts of others."""

    @classmethod
    def of(cls, identity: Any) -> StorageRef | None:
        """Return what a persistent id refers to, if it is a storage."""
        match identity:
            case (_, Global(name=name), key, _, _, *rest):
                offset = rest[0][1] if rest and isinstance(rest[0], tuple) and len(rest[0]) == 3 else 0
                if isinstance(offset, int) and 0 <= offset < 1 << 62:
                    return cls(str(key), STORAGES.get(name, "uint8"), offset)
        return None


@attrs.frozen(kw_only=True)
class Stored:
    """A tensor: how it is made of storages."""

    dtype: str
    shape: tuple[int, ...]
    layout: str = "strided"

    @classmethod
    def of(cls, value: Any) -> Stored | None:
        """Return what a tensor is, if the call makes one; None for anything else."""
        call = _unwrapped(value)
        if not isinstance(call, Call) or not isinstance(call.what, Global) or call.what.module != "torch._utils":
            return None
        name, args = call.what.name, args_of(call)
        if name in _STRIDED:
            return _strided(name, args)
        if name == "_rebuild_sparse_tensor":
            return _sparse(args)
        return _quantised(args) if name == "_rebuild_qtensor" else None

    def needs(self) -> Iterator[tuple[StorageRef, int]]:
        """Yield each storage, and how many of its bytes there have to be at least."""
        raise NotImplementedError

    def make(self, name: str, read: Read) -> Any:
        """Return the tensor; ``name`` is for messages."""
        raise NotImplementedError


@attrs.frozen(kw_only=True)
class Strided(Stored):
    """A tensor whose elements lie in one storage."""

    storage: StorageRef
    offset: int
    stride: tuple[int, ...]
    conj: bool = False
    neg: bool = False

    @property
    def span(self) -> int:
        """Elements from its first to its last, both included."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    def needs(self) -> Iterator[tuple[StorageRef, int]]:
        """See `Stored.needs`."""
        yield self.storage, _bytes(self.dtype, self.storage.offset + self.offset + self.span)

    def make(self, name: str, read: Read) -> Any:
        """See `Stored.make`."""
        import torch

        dtype = getattr(torch, self.dtype, None) if self.dtype in ITEM_SIZES else None
        if dtype is None:
            msg = f"{name} is of dtype {self.dtype}, which cannot be read with this version of torch"
            raise CorruptError(msg)
        item = ITEM_SIZES[self.dtype]
        start, length = (self.storage.offset + self.offset) * item, self.span * item
        self.check_size(name)
        if not length:
            return torch.empty(self.shape, dtype=dtype)
        with _corrupt(f"{name} ({self.dtype})"):
            data = torch.frombuffer(read(self.storage, start, length), dtype=torch.uint8)
            tensor = data.view(dtype).as_strided(self.shape, self.stride)
        if self.conj and tensor.is_complex():
            tensor = tensor.conj().resolve_conj()
        return tensor.neg() if self.neg else tensor

    def check_size(self, name: str) -> None:
        """Raise if a few bytes stand for very many elements."""
        length, size = _bytes(self.dtype, self.span), _bytes(self.dtype, math.prod(self.shape))
        if size > length and size > MAX_EXPANDED_BYTES:
            msg = f"{name} repeats {length} bytes to {size}; load the checkpoint itself"
            raise CorruptError(msg)


@attrs.frozen(kw_only=True)
class Quantised(Strided):
    """A tensor of integers, with the scales that make numbers of them."""

    scheme: str
    parameters: tuple[Any, ...]
    """Scale and zero point; or scales, zero points (tensors) and axis."""

    def needs(self) -> Iterator[tuple[StorageRef, int]]:
        """See `Stored.needs`."""
        yield from super().needs()
        for part in self.parameters:
            if isinstance(part, Stored):
                yield from part.needs()

    def make(self, name: str, read: Read) -> Any:
        """See `Stored.make`."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*quantize")  # torch will drop them: that is known here.
            return self._make(name, read)

    def _make(self, name: str, read: Read) -> Any:
        import torch

        self.check_size(name)
        parts = [part.make(name, read) if isinstance(part, Stored) else part for part in self.parameters]
        dtype = getattr(torch, self.dtype, None)
        with _corrupt(name):
            if self.scheme == "per_tensor_affine":
                empty = torch._empty_affine_quantized(self.shape, scale=parts[0], zero_point=parts[1], dtype=dtype)
            else:
                scales, zeros, axis = parts
                if not scales.numel() == zeros.numel() == self.shape[axis]:
                    msg = f"there are {scales.numel()} scales and {zeros.numel()} zero points along axis {axis}"
                    raise ValueError(msg)
                empty = torch._empty_per_channel_affine_quantized(
                    self.shape, scales=scales, zero_points=zeros, axis=axis, dtype=dtype
                )
        return self._fill(empty, read)

    def _fill(self, empty: Any, read: Read) -> Any:
        import torch

        storage = empty.untyped_storage()
        if self.dtype in PACKED:
            start, length = self.storage.offset + self.offset, storage.nbytes()
        else:
            item = ITEM_SIZES[self.dtype]
            start, length = (self.storage.offset + self.offset) * item, self.span * item
        if not length:
            return empty
        data = torch.frombuffer(read(self.storage, start, length), dtype=torch.uint8).untyped_storage()
        typed = torch.storage.TypedStorage(wrap_storage=data, dtype=empty.dtype, _internal=True)  # type: ignore[no-untyped-call]
        return empty.set_(typed, 0, self.shape, self.stride)


@attrs.frozen(kw_only=True)
class Sparse(Stored):
    """A tensor of which only some elements are stored."""

    parts: tuple[Stored, ...]
    """Indices (compressed and plain ones, for the layouts that have both), then values."""

    def needs(self) -> Iterator[tuple[StorageRef, int]]:
        """See `Stored.needs`."""
        for part in self.parts:
            yield from part.needs()

    def make(self, name: str, read: Read) -> Any:
        """See `Stored.make`."""
        import torch

        parts: list[Any] = [part.make(name, read) for part in self.parts]
        shape: Any = self.shape
        with _corrupt(name):
            if self.layout == "sparse_coo":
                indices, values = parts
                return torch.sparse_coo_tensor(indices, values, shape, check_invariants=True)
            compressed, plain, values = parts
            layout = getattr(torch, self.layout)
            return torch.sparse_compressed_tensor(
                compressed, plain, values, shape, layout=layout, check_invariants=True
            )


_COMPRESSED: Final = ("sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc")


@contextlib.contextmanager
def _corrupt(name: str) -> Iterator[None]:
    """Turn the errors of torch into one that says that the tensor cannot be made."""
    try:
        yield
    except CorruptError:
        raise
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        msg = f"{name} cannot be made of what is there: {error}"
        raise CorruptError(msg) from error


def _bytes(dtype: str, count: int) -> int:
    return -(-count // PACKED[dtype]) if dtype in PACKED else count * ITEM_SIZES.get(dtype, 1)


def _unwrapped(value: Any) -> Any:
    """Return the call that makes a tensor, out of those that make a parameter or a subclass of it."""
    for _ in range(8):
        if not isinstance(value, Call) or not isinstance(value.what, Global):
            return value
        args = args_of(value)
        if value.what.name in _UNWRAPPED and args:
            value = args[0]
        elif value.what.name == "_rebuild_from_type_v2" and len(args) >= 3:
            value = Call(args[0], args[2])
        else:
            return value
    return value


def _strided(name: str, args: tuple[Any, ...]) -> Strided | None:
    found = _place(args)
    if found is None:
        return None
    dtype = found["storage"].dtype
    if name == "_rebuild_tensor_v3" and len(args) > 6 and isinstance(args[6], Global):
        dtype = args[6].name
    at = _STRIDED[name]
    flags = args[at] if at is not None and len(args) > at and isinstance(args[at], dict) else {}
    return Strided(dtype=dtype, **found, conj=flags.get("conj") is True, neg=flags.get("neg") is True)


def _place(args: tuple[Any, ...]) -> dict[str, Any] | None:
    if len(args) < 4 or not isinstance(args[0], Persistent):
        return None
    storage, offset, shape, stride = StorageRef.of(args[0].id), args[1], _ints(args[2]), _ints(args[3])
    if storage is None or shape is None or stride is None or len(shape) != len(stride):
        return None
    if not isinstance(offset, int) or offset < 0:
        return None
    return {"storage": storage, "offset": offset, "shape": shape, "stride": stride}


def _quantised(args: tuple[Any, ...]) -> Quantised | None:
    found = _place(args)
    match args[4:5]:
        case ((Global(name=scheme), *parameters),) if scheme in _SCHEMES and found is not None:
            made = tuple(Stored.of(part) or part for part in parameters)
            if scheme == "per_tensor_affine":
                kinds: tuple[Any, ...] = ((int, float), int)
            else:
                kinds = (Stored, Stored, int)
            if len(made) == len(kinds) and all(map(isinstance, made, kinds)):
                return Quantised(dtype=found["storage"].dtype, **found, scheme=scheme, parameters=made)
    return None


def _sparse(args: tuple[Any, ...]) -> Sparse | None:
    match args:
        case (Call(args=(str(layout),)), tuple(data)):
            layout = layout.removeprefix("torch.")
            count = 2 if layout == "sparse_coo" else 3 if layout in _COMPRESSED else 0
            parts = tuple(part for item in data[:count] if (part := Stored.of(item)) is not None)
            shape = _ints(data[count]) if len(data) > count else None
            if count and len(parts) == count and shape is not None:
                return Sparse(dtype=parts[-1].dtype, shape=shape, layout=layout, parts=parts)
    return None


def _ints(value: Any) -> tuple[int, ...] | None:
    if isinstance(value, Call) and isinstance(value.what, Global) and value.what.name == "Size" and args_of(value):
        value = args_of(value)[0]
    if isinstance(value, (tuple, list)) and all(isinstance(n, int) and 0 <= n < 1 << 62 for n in value):
        return tuple(value)
    return None
