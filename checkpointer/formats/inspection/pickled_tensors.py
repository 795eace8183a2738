"""Reads the tensors in a pickle: dtype, shape, and the bytes of the storages that they are made of."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Final

import attrs

from checkpointer.errors import CorruptError
from checkpointer.formats.inspection.pickle import CONTAINERS, Call, Global, Persistent
from checkpointer.formats.inspection.tensors import (
    ITEM_SIZES,
    MAX_ELEMENTS,
    PACKED,
    TensorInfo,
    as_shape,
    as_sizes,
    dtype_named,
)

MAX_REPEATED_BYTES: Final = 1 << 26
MAX_REPEATED: Final = 64
"""A tensor that repeats its memory, or is sparse, is read if its elements take `MAX_REPEATED_BYTES`, or so many times
the bytes that are stored for it."""
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
_STRIDED: Final = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3")
"""Functions that make a strided tensor. The second has flags as its last argument, and the third a dtype before."""

Read = Callable[["StorageRef", int, int], "bytearray | memoryview"]
"""Returns bytes of a storage: from where, and how many."""


def is_known(found: Global) -> bool:
    """Return whether it makes plain containers, or is a name of torch's own for storages, dtypes and tensors."""
    if found.module == "torch._utils":
        return found.name.startswith("_rebuild_")
    is_type = found.module in ("torch", "torch.storage") and (
        found.name.endswith("Storage") or found.name in ITEM_SIZES or found.name in _SCHEMES
    )
    return is_type or (found.module, found.name) in {
        *CONTAINERS,
        ("torch._tensor", "_rebuild_from_type_v2"),
        ("torch.serialization", "_get_layout"),
    }


@attrs.frozen
class StorageRef:
    """The bytes that tensors share."""

    key: str
    dtype: str
    offset: int
    """Of its first element, in elements: storages of old files may be parts of others."""
    count: int = 0
    """Elements of all of it."""

    @classmethod
    def of(cls, identity: Any) -> StorageRef | None:
        """Return what a persistent id refers to, if it is a storage."""
        match identity:
            case (_, Global(name=name), str() | int() as key, _, int(count), *rest):
                offset = rest[0][1] if rest and isinstance(rest[0], tuple) and len(rest[0]) == 3 else 0
                if isinstance(offset, int) and 0 <= offset <= MAX_ELEMENTS and 0 <= count <= MAX_ELEMENTS:
                    return cls(str(key), STORAGES.get(name, "uint8"), offset, count)
        return None


@attrs.frozen(kw_only=True)
class Stored:
    """A tensor: how it is made of storages."""

    dtype: str
    shape: tuple[int, ...]
    layout: str = "strided"
    parts: tuple[Any, ...] = ()
    """What else it is made of: of tensors that are not numbers in one storage, other tensors and their parameters."""

    @classmethod
    def of(cls, value: Any) -> Stored | None:
        """Return what a tensor is, if the call makes one; None for anything else."""
        name, args = _rebuild_call(value)
        if name == "_rebuild_qtensor":
            return _quantised(args)
        return _sparse(args) if name == "_rebuild_sparse_tensor" else _strided(name, args)

    def info(self, name: str) -> TensorInfo:
        """Return what is known of it before a byte is read."""
        return TensorInfo(name=name, dtype=self.dtype, shape=self.shape, layout=self.layout)

    def needs(self) -> Iterator[tuple[StorageRef, int]]:
        """Yield each storage, and how many of its bytes there have to be at least."""
        for part in self.parts:
            if isinstance(part, Stored):
                yield from part.needs()

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

    def _place(self) -> tuple[int, int]:
        """Return where its bytes begin in the storage, and how many they are from its first element to its last."""
        item = ITEM_SIZES.get(self.dtype, 1)
        span = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        length = self.info("").bytes if self.dtype in PACKED or 0 in self.shape else span * item
        return (self.storage.offset + self.offset) * item, length

    def needs(self) -> Iterator[tuple[StorageRef, int]]:
        """See `Stored.needs`."""
        whole = self.storage.count * ITEM_SIZES.get(self.storage.dtype, 1)
        yield self.storage, max(sum(self._place()), whole)
        yield from super().needs()

    def data(self, name: str, read: Read) -> Any:
        """Return its bytes from its first element to its last; raise if a few bytes stand for very many elements."""
        import torch

        start, length = self._place()
        size = self.info(name).bytes
        if is_too_large(size, length):
            msg = f"{name} repeats {length} bytes to {size}; load the checkpoint itself"
            raise CorruptError(msg)
        if not length:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(read(self.storage, start, length), dtype=torch.uint8)

    def make(self, name: str, read: Read) -> Any:
        """See `Stored.make`."""
        dtype = dtype_named(self.dtype)
        if dtype is None:
            msg = f"{name} is of dtype {self.dtype}, which cannot be read with this version of torch"
            raise CorruptError(msg)
        with _corrupt(f"{name} ({self.dtype})"):
            tensor = self.data(name, read).view(dtype).as_strided(self.shape, self.stride)
        if self.conj and tensor.is_complex():
            tensor = tensor.conj().resolve_conj()
        return tensor.neg() if self.neg else tensor


@attrs.frozen(kw_only=True)
class Quantised(Strided):
    """A tensor of integers, and as parts what makes numbers of them: scale and zero point, or those of each channel."""

    scheme: str

    def make(self, name: str, read: Read) -> Any:
        """See `Stored.make`."""
        import torch

        parts = [part.make(name, read) if isinstance(part, Stored) else part for part in self.parts]
        with _corrupt(name), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*quantize")  # torch will drop them: that is known here.
            if self.scheme != "per_tensor_affine":
                scales, zeros, axis = parts
                if not scales.numel() == zeros.numel() == self.shape[axis]:
                    msg = f"there are {scales.numel()} scales and {zeros.numel()} zero points along axis {axis}"
                    raise ValueError(msg)
            data, dtype = self.data(name, read).untyped_storage(), getattr(torch, self.dtype)
            typed = torch.storage.TypedStorage(wrap_storage=data, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]
            quantizer = getattr(torch, self.scheme), *parts
            return torch._utils._rebuild_qtensor(typed, 0, self.shape, self.stride, quantizer, False, None)  # type: ignore[no-untyped-call]


@attrs.frozen(kw_only=True)
class Sparse(Stored):
    """A tensor of which some elements are stored: its parts are indices (one or two tensors of them), then values."""

    def make(self, name: str, read: Read) -> Any:
        """See `Stored.make`."""
        import torch

        *indices, values = (part.make(name, read) for part in self.parts)
        shape: Any = self.shape
        with _corrupt(name):
            if self.layout == "sparse_coo":
                return torch.sparse_coo_tensor(indices[0], values, shape, check_invariants=True)
            layout = getattr(torch, self.layout)
            return torch.sparse_compressed_tensor(
                indices[0], indices[1], values, shape, layout=layout, check_invariants=True
            )


def is_too_large(size: int, stored: int) -> bool:
    """Return whether elements of ``size`` bytes are too many for what is ``stored`` (bytes): it repeats, or is sparse.

    Example:
        >>> is_too_large(100, 100), is_too_large(1 << 40, 1 << 20)
        (False, True)
    """
    return size > stored and size > max(MAX_REPEATED_BYTES, MAX_REPEATED * stored)


_COMPRESSED: Final = ("sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc")


@contextlib.contextmanager
def _corrupt(name: str) -> Iterator[None]:
    """Turn the errors of torch into one that says that the tensor cannot be made."""
    try:
        yield
    except (CorruptError, OSError, MemoryError):
        raise
    except Exception as error:
        msg = f"{name} cannot be made of what is there: {error}"
        raise CorruptError(msg) from error


def _rebuild_call(value: Any) -> tuple[str, tuple[Any, ...]]:
    """Return the function of torch and the arguments that make a tensor, a parameter or a subclass of it."""
    for _ in range(8):
        match value:
            case Call(what=Global(name=name), args=(inner, *_)) if name in _UNWRAPPED:
                value = inner
            case Call(what=Global(name="_rebuild_from_type_v2"), args=(what, _, tuple(args), *_)):
                value = Call(what, args)
            case Call(what=Global(module="torch._utils", name=name), args=args):
                return name, args
            case _:
                break
    return "", ()


def makes_numbers(value: Any) -> bool:
    """Return whether torch would make a tensor of storages of a value."""
    return _rebuild_call(value)[0] in (*_STRIDED, "_rebuild_qtensor", "_rebuild_sparse_tensor")


def _strided(name: str, args: tuple[Any, ...]) -> Strided | None:
    match args:
        case (Persistent(id=identity), int(offset), sizes, steps, *_) if (
            0 <= offset <= MAX_ELEMENTS and name in _STRIDED
        ):
            storage, shape, stride = StorageRef.of(identity), as_shape(sizes), as_sizes(steps)
            if storage is None or shape is None or stride is None or len(shape) != len(stride):
                return None
            found: dict[str, Any] = {"dtype": storage.dtype}
            for extra in args[6:8]:
                if isinstance(extra, Global):
                    found["dtype"] = extra.name
                elif isinstance(extra, dict):
                    found |= {flag: extra.get(flag) is True for flag in ("conj", "neg")}
            return Strided(storage=storage, offset=offset, shape=shape, stride=stride, **found)
    return None


def _quantised(args: tuple[Any, ...]) -> Quantised | None:
    found, quantizer = _strided(_STRIDED[0], args[:4]), args[4] if len(args) > 4 else None
    if found is None or not isinstance(quantizer, tuple) or not 3 <= len(quantizer) <= 4:
        return None
    match quantizer:
        case (Global(name=scheme), *parameters) if scheme in _SCHEMES:
            parts = tuple(_strided(*_rebuild_call(part)) or part for part in parameters)
            kinds: Any = ((int, float), int) if scheme == "per_tensor_affine" else (Strided, Strided, int)
            if len(parts) == len(kinds) and all(map(isinstance, parts, kinds)):
                return Quantised(**attrs.asdict(found, recurse=False) | {"scheme": scheme, "parts": parts})
    return None


def _sparse(args: tuple[Any, ...]) -> Sparse | None:
    match args:
        case (Call(args=(str(layout),)), tuple(data)):
            layout = layout.removeprefix("torch.")
            count = 2 if layout == "sparse_coo" else 3 if layout in _COMPRESSED else 0
            parts = tuple(part for item in data[:count] if (part := _strided(*_rebuild_call(item))) is not None)
            shape = as_shape(data[count]) if len(data) > count else None
            if count and len(parts) == count and shape is not None:
                return Sparse(dtype=parts[-1].dtype, shape=shape, layout=layout, parts=parts)
    return None
