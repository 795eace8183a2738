"""Builds well-formed files with odd types, sizes, numbers, texts and nesting, from harmless parts."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any, Final

import attrs


@attrs.frozen
class Named:
    """A class or function in a pickle."""

    module: str
    name: str


@attrs.frozen
class Made:
    """A call in a pickle, and the state that its result gets."""

    what: Any
    args: Any
    state: Any = None


@attrs.frozen
class Ref:
    """A reference to something outside of a pickle."""

    id: Any


@attrs.frozen
class Deep:
    """A value in lists within lists."""

    depth: int
    leaf: Any


def pickled(value: Any) -> bytes:
    """Return a pickle of plain data, `Named`, `Made`, `Ref` and `Deep`. Nothing is imported or called for it."""
    return b"\x80\x02" + _emitted(value) + b"."


def _emitted(value: Any) -> bytes:
    match value:
        case None | True | False:
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        case int():
            data = pickle.encode_long(value)
            if len(data) < 256:
                return b"\x8a" + bytes([len(data)]) + data
            return b"\x8b" + struct.pack("<i", len(data)) + data
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            data = value.encode("utf-8", "surrogatepass")
            return b"X" + struct.pack("<I", len(data)) + data
        case bytes():
            return b"B" + struct.pack("<I", len(value)) + value
        case tuple():
            return b"(" + b"".join(map(_emitted, value)) + b"t"
        case list():
            return b"](" + b"".join(map(_emitted, value)) + b"e"
        case dict():
            return b"}(" + b"".join(_emitted(key) + _emitted(item) for key, item in value.items()) + b"u"
        case Named(module, name):
            if (module + name).isascii() and (module + name).isprintable():
                return f"c{module}\n{name}\n".encode()
            return _emitted(module) + _emitted(name) + b"\x93"
        case Made(what, args, state):
            return _emitted(what) + _emitted(args) + b"R" + (b"" if state is None else _emitted(state) + b"b")
        case Deep(depth, leaf):
            return b"]" * depth + _emitted(leaf) + b"a" * depth
        case Ref(identity):
            return _emitted(identity) + b"Q"
    raise TypeError(value)


def tensor(key: Any = "0", count: Any = 4, shape: Any = (4,), stride: Any = (1,), offset: Any = 0) -> Made:
    """Return what torch pickles for a tensor of float32."""
    storage = Ref(("storage", Named("torch", "FloatStorage"), key, "cpu", count))
    hooks = Made(Named("collections", "OrderedDict"), ())
    return Made(Named("torch._utils", "_rebuild_tensor_v2"), (storage, offset, shape, stride, False, hooks))


def zipped(data: bytes, storages: Mapping[str, bytes], kind: int = zipfile.ZIP_STORED) -> bytes:
    """Return a torch file with this pickle and these storages."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", kind) as archive:
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), data)
        archive.writestr(zipfile.ZipInfo("archive/version"), "3\n")
        for key, content in storages.items():
            archive.writestr(f"archive/data/{key}", content)
    return stream.getvalue()


def torch_file(state: Any, storages: Mapping[str, bytes] | None = None) -> bytes:
    """Return a torch file of a state."""
    return zipped(pickled(state), {"0": struct.pack("<4f", 1, 2, 3, 4)} if storages is None else storages)


LEGACY: Final = 0x1950A86A20F9469CFC6C


def legacy_file(state: Any, keys: Any = ("0",), counts: Iterable[int] = (4,), tail: bytes = b"\0" * 16) -> bytes:
    """Return what torch before 1.6 wrote: pickles, then the number of elements of each storage before its bytes."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = b"".join(map(pickled, (LEGACY, 1001, system, state, [*keys] if isinstance(keys, tuple) else keys)))
    return head + b"".join(struct.pack("<Q", count & (1 << 64) - 1) + tail for count in counts)


def bent_zip(data: bytes, offset: int, value: int, name: bytes = b"archive/data/0") -> bytes:
    """Return a zip file with another byte in the directory entry of one member."""
    at = data.rindex(name) - 46 + offset
    return data[:at] + bytes([value]) + data[at + 1 :]


def safetensors_file(header: Any, content: bytes = b"\0" * 16) -> bytes:
    """Return a safetensors file of a header, which is JSON or bytes."""
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(data)) + data + content


_DCP: Final = "torch.distributed.checkpoint"


def _dcp(name: str, state: Any, module: str = "metadata") -> Made:
    return Made(Named(f"{_DCP}.{module}", name), (), state)


def _size(sizes: Any) -> Made:
    return Made(Named("torch", "Size"), (sizes,))


def dcp_metadata(
    *, size: Any = (4,), chunk: Any = (4,), dtype: Any = "float32", length: Any = 2000, path: Any = ("w",)
) -> dict[str, Any]:
    """Return the fields of a DCP folder's metadata for one tensor."""
    layout = Made(Named("torch.serialization", "_get_layout"), ("torch.strided",))
    memory = Made(Named(f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"), (0,))
    properties = _dcp("TensorProperties", (Named("torch", dtype), layout, False, memory, False))
    chunks = [_dcp("ChunkStorageMetadata", {"offsets": _size((0,)), "sizes": _size(chunk)})]
    stored = _dcp("TensorStorageMetadata", {"properties": properties, "size": _size(size), "chunks": chunks})
    info = _dcp("_StorageInfo", {"relative_path": "__0_0.distcp", "offset": 0, "length": length}, "filesystem")
    return {
        "state_dict_metadata": {"w": stored},
        "planner_data": {"w": path},
        "storage_data": [("w", (0,), info)],
        "storage_meta": None,
    }


def dcp_file(fields: Mapping[str, Any]) -> bytes:
    """Return the metadata file; each entry of ``storage_data`` is a name, an offset and a place."""
    places = fields["storage_data"]
    if isinstance(places, list):
        # The keys are objects, so this mapping is written item by item.
        items = b"".join(
            _emitted(_dcp("MetadataIndex", {"fqn": name, "offset": _size(offset), "index": 0})) + _emitted(info)
            for name, offset, info in places
        )
        written = b"}(" + items + b"u"
    else:
        written = _emitted(places)
    others = b"".join(_emitted(k) + _emitted(v) for k, v in fields.items() if k != "storage_data")
    state = b"}(" + others + _emitted("storage_data") + written + b"u"
    return b"\x80\x02" + _emitted(Named(f"{_DCP}.metadata", "Metadata")) + b")\x81" + state + b"b."
