"""Looks into a safetensors file, and writes one: its header says where each tensor lies.

The `format <https://huggingface.co/docs/safetensors>`_: 8 bytes with the length of the header (little-endian), the
header as JSON, then the bytes of each tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO, Final

from checkpointer._validation import brief
from checkpointer.errors import CorruptError
from checkpointer.formats.inspection.tensors import (
    ITEM_SIZES,
    Part,
    TensorInfo,
    Tensors,
    as_shape,
    dtype_named,
)
from checkpointer.formats.tensor_bytes import memory_of, read_exactly
from checkpointer.ports import Writable
from checkpointer.records.codec import object_once

MAX_HEADER_BYTES: Final = 100_000_000
"""A longer header is refused, as the format itself says."""

_TORCH_NAMES: Final = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "BOOL": "bool",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F4": "float4_e2m1fn_x2",
}
"""torch's name of each dtype."""
_NAMES: Final = {ours: theirs for theirs, ours in _TORCH_NAMES.items()}
_PAIRS: Final = "float4_e2m1fn_x2"
"""torch counts pairs of these elements, and safetensors counts elements."""


def entry(info: TensorInfo, offset: int) -> dict[str, Any] | None:
    """Return what a header says of a tensor whose bytes begin at ``offset``; None if the format cannot hold it."""
    if info.dtype not in _NAMES or not info.is_dense or (info.dtype == _PAIRS and not info.shape):
        return None
    shape = [*info.shape]
    if info.dtype == _PAIRS:
        shape[-1] *= 2
    return {"dtype": _NAMES[info.dtype], "shape": shape, "data_offsets": [offset, offset + info.bytes]}


def write_safetensors(stream: Writable, infos: Iterable[TensorInfo], read: Callable[[str], Any]) -> None:
    """Write tensors one at a time, each with an `entry`. Wide dtypes come first, so that each tensor is aligned."""
    order = sorted(infos, key=lambda info: -ITEM_SIZES.get(info.dtype, 1))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for info in order:
        header[info.name] = entry(info, offset)
        offset += info.bytes
    data = json.dumps(header).encode()
    data += b" " * (-len(data) % 8)  # The tensors' bytes begin at a multiple of 8.
    stream.write(len(data).to_bytes(8, "little") + data)
    for info in order:
        memory = memory_of(read(info.name))
        assert memory.nbytes == info.bytes, f"{info.name} has another size than was announced"
        stream.write(memory)


class SafetensorsContents(Tensors):
    """An opened safetensors file."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__()
        self._stream = stream
        self._size = stream.seek(0, 2)
        header, self.start = _header(stream, self._size)
        metadata = header.pop("__metadata__", {})
        self.others = dict(metadata) if isinstance(metadata, dict) else {}
        self.offsets: dict[str, tuple[int, int]] = {}
        """Where the bytes of each tensor begin and end, from ``start`` on."""
        for name, entry in header.items():
            self.tensors[name], self.offsets[name] = _tensor(name, entry)
        _check_apart(self.offsets)
        # safetensors.torch.save_model writes a tied tensor once, and its other names as metadata.
        names = {name: kept for name, kept in self.others.items() if isinstance(kept, str)}
        tied = {name: kept for name, kept in names.items() if kept in self.tensors and name not in self.tensors}
        if self.tensors:
            self.parts = {"": Part(names={name: name for name in self.tensors} | tied)}

    def problems(self) -> list[str]:
        """See `Tensors.problems`."""
        size = self._size - self.start
        return [
            f"{n} ends at byte {end}, and the file has {size}" for n, (_, end) in self.offsets.items() if end > size
        ]

    def _read(self, name: str) -> Any:
        import torch

        info, (start, end) = self.tensors[name], self.offsets[name]
        dtype = dtype_named(info.dtype)
        if dtype is None or self.start + end > self._size:
            msg = f"{name} ({info.dtype}) cannot be read: the file ends before byte {end}, or the dtype is new to torch"
            raise CorruptError(msg)
        if start == end:
            return torch.empty(info.shape, dtype=dtype)
        self._stream.seek(self.start + start)
        data = read_exactly(self._stream, end - start, name)
        return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(info.shape)

    def close(self) -> None:
        """See `Tensors.close`."""
        self._stream.close()


def _header(stream: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    stream.seek(0)
    length = int.from_bytes(stream.read(8), "little")
    if not 2 <= length <= MAX_HEADER_BYTES:
        msg = f"it is neither a torch file nor safetensors: as the latter its header would have {length} bytes"
        raise CorruptError(msg)
    if length > size - 8:
        msg = f"its safetensors header would have {length} bytes, and the file has {size}"
        raise CorruptError(msg)
    try:
        header = json.loads(stream.read(length), object_pairs_hook=object_once)
    except (ValueError, RecursionError) as error:
        msg = f"its safetensors header cannot be read ({error})"
        raise CorruptError(msg) from error
    if not isinstance(header, dict):
        msg = "its safetensors header is not a JSON object"
        raise CorruptError(msg)
    return header, 8 + length


def _tensor(name: str, entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(end)]}:
            dtype = _TORCH_NAMES.get(dtype, dtype)
            if dtype == _PAIRS and shape and isinstance(shape[-1], int) and shape[-1] % 2 == 0:
                shape = [*shape[:-1], shape[-1] // 2]
            sizes = as_shape(shape)
            if sizes is not None and 0 <= start <= end:
                info = TensorInfo(name=name, dtype=dtype, shape=sizes)
                if dtype not in ITEM_SIZES or info.numel * ITEM_SIZES[dtype] == end - start:
                    return info, (start, end)
    msg = f"its safetensors header says {brief(entry)} of {brief(name)}; expected dtype, shape and offsets that agree"
    raise CorruptError(msg)


def _check_apart(offsets: Mapping[str, tuple[int, int]]) -> None:
    """Raise if two tensors have the same bytes: a small file would stand for a huge one."""
    before, last = 0, ""
    for name, (start, end) in sorted(offsets.items(), key=lambda item: item[1]):
        if start < before and end > start:
            msg = f"its safetensors header says that {brief(last)} and {brief(name)} overlap; no file has such tensors"
            raise CorruptError(msg)
        before, last = max(before, end), name
