"""Looks into a torch file without unpickling it: its pickle is read as text is, its tensors are byte ranges."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO, Final

import attrs

from checkpointer.errors import CorruptError
from checkpointer.formats.pickled import Call, Global, Persistent, globals_in, read_pickle
from checkpointer.formats.scalars import scalar_of
from checkpointer.formats.tensors import ITEM_SIZES, TensorInfo

__all__ = ["TorchContents", "open_legacy", "open_zip"]

MAX_PICKLE_BYTES: Final = 1 << 28
MAX_ENTRIES: Final = 200_000
MAX_EXPANDED_BYTES: Final = 1 << 30
"""A tensor that repeats its memory is not read if it would take more than this."""
_LOCAL_HEADER: Final = 30
_LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C
_STORAGES: Final = {
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
_MAPPINGS: Final = {("collections", "OrderedDict"), ("collections", "Counter"), ("collections", "defaultdict")}
_LISTS: Final = {("builtins", "set"), ("builtins", "frozenset"), ("builtins", "list"), ("torch", "Size")}
_PLAIN: Final = _MAPPINGS | _LISTS | {("builtins", "complex"), ("torch", "device"), ("_codecs", "encode")}
_UNWRAPPED: Final = {"_rebuild_parameter", "_rebuild_parameter_with_state"}
_TENSORS: Final = {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_qtensor"}


@attrs.frozen(kw_only=True)
class _View:
    """Where a tensor's elements lie in its storage."""

    key: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def span(self) -> int:
        """Elements from its first to its last, both included."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))


@attrs.frozen
class _Range:
    """Where a storage's bytes lie in the file."""

    start: int
    size: int


class TorchContents:
    """An opened torch file, see `Tensors`."""

    def __init__(self, stream: BinaryIO, root: Any, ranges: Mapping[str, _Range]) -> None:
        self._stream = stream
        self._ranges = ranges
        self._views: dict[str, _View] = {}
        self.root = root
        """What the pickle says, as `read_pickle` returns it."""
        self.tensors: dict[str, TensorInfo] = {}
        self.others: dict[str, Any] = {}
        self.calls = tuple(sorted(str(found) for found in globals_in(root) if not _is_known(found)))
        for path, value in _leaves(root):
            self._add(".".join(path) or "(the whole)", value)

    def _add(self, name: str, value: Any) -> None:
        count = 2
        free = name
        while free in self.tensors or free in self.others:
            free, count = f"{name}#{count}", count + 1
        found = _tensor(value)
        if found is None:
            self.others[free] = _plain(value)
        else:
            view, dtype = found
            self.tensors[free] = TensorInfo(name=free, dtype=dtype, shape=view.shape)
            self._views[free] = view

    def read(self, name: str) -> Any:
        """See `Tensors.read`."""
        import torch

        info, view = self.tensors[name], self._views[name]
        dtype = getattr(torch, info.dtype, None)
        if dtype is None or info.dtype.startswith("q"):
            msg = f"{name} is of dtype {info.dtype}, which cannot be read tensor by tensor; load the checkpoint itself"
            raise CorruptError(msg)
        item, where = ITEM_SIZES[info.dtype], self._ranges.get(view.key)
        start, length = view.offset * item, view.span * item
        if where is None or start + length > where.size:
            msg = f"{name} lies at bytes {start} to {start + length} of storage {view.key!r}, which has not so many"
            raise CorruptError(msg)
        if info.numel > view.span and info.bytes > MAX_EXPANDED_BYTES:
            msg = f"{name} repeats {length} bytes to {info.bytes}; load the checkpoint itself"
            raise CorruptError(msg)
        if not length:
            return torch.empty(view.shape, dtype=dtype)
        data = bytearray(length)
        self._stream.seek(where.start + start)
        _read_into(self._stream, data, name)
        return torch.frombuffer(data, dtype=dtype).as_strided(view.shape, view.stride)

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with tensors whose bytes are not all there, in words."""
        for name, view in self._views.items():
            where = self._ranges.get(view.key)
            needs = (view.offset + view.span) * ITEM_SIZES.get(self.tensors[name].dtype, 1)
            if where is None or needs > where.size:
                have = "is not there" if where is None else f"has {where.size} bytes"
                yield f"{name} needs {needs} bytes of storage {view.key!r}, which {have}"

    def close(self) -> None:
        """See `Tensors.close`."""
        self._stream.close()


def _read_into(stream: BinaryIO, data: bytearray, name: str) -> None:
    view = memoryview(data)
    done = 0
    while done < len(view):
        # No stream is asked for gigabytes at once: remote ones would hold them twice.
        chunk = stream.read(min(len(view) - done, 8 << 20))
        if not chunk:
            msg = f"the file ends within {name}"
            raise CorruptError(msg)
        view[done : done + len(chunk)] = chunk
        done += len(chunk)


# The two kinds of torch files


def open_zip(stream: BinaryIO) -> TorchContents:
    """Open what ``torch.save`` writes since 1.6; the stream is closed with it.

    Raises:
        CorruptError: If it is none.
    """
    try:
        with zipfile.ZipFile(stream) as archive:
            members = archive.infolist()
            pickles = [m for m in members if m.filename.endswith("/data.pkl") or m.filename == "data.pkl"]
            if len(pickles) != 1:
                msg = "it is a zip file without one data.pkl, so torch.save did not write it"
                raise CorruptError(msg)
            if pickles[0].file_size > MAX_PICKLE_BYTES:
                msg = f"its data.pkl has {pickles[0].file_size} bytes; at most {MAX_PICKLE_BYTES} are read"
                raise CorruptError(msg)
            root = pickles[0].filename.removesuffix("data.pkl")
            data = _read(stream, pickles[0])
        ranges = {m.filename.removeprefix(f"{root}data/"): _range(stream, m) for m in members if _is_data(m, root)}
    except (OSError, MemoryError, CorruptError):
        raise
    except Exception as error:  # zipfile raises BadZipFile, NotImplementedError, struct.error, UnicodeDecodeError...
        msg = f"it cannot be read as a zip file ({type(error).__name__}: {error})"
        raise CorruptError(msg) from error
    return TorchContents(stream, read_pickle(io.BytesIO(data)), ranges)


def _read(stream: BinaryIO, member: zipfile.ZipInfo) -> bytes:
    """Return a member's bytes; torch writes no checksum where ``set_crc32_options(False)`` says so."""
    where = _range(stream, member)
    stream.seek(where.start)
    data = stream.read(where.size)
    if len(data) != where.size or (member.CRC and zlib.crc32(data) != member.CRC):
        msg = f"its {member.filename} is not what was written"
        raise CorruptError(msg)
    return data


def _is_data(member: zipfile.ZipInfo, root: str) -> bool:
    return member.filename.startswith(f"{root}data/")


def _range(stream: BinaryIO, member: zipfile.ZipInfo) -> _Range:
    if member.compress_type != zipfile.ZIP_STORED:
        msg = f"its {member.filename} is compressed, which torch.save never does"
        raise CorruptError(msg)
    stream.seek(member.header_offset)
    header = stream.read(_LOCAL_HEADER)
    names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return _Range(member.header_offset + _LOCAL_HEADER + names, member.file_size)


def open_legacy(stream: BinaryIO) -> TorchContents:
    """Open what ``torch.save`` wrote before 1.6, or any other pickle; the stream is closed with it.

    Raises:
        CorruptError: If it is none.
    """
    bounded: Any = _Bounded(stream)
    first = read_pickle(bounded)
    if first != _LEGACY_MAGIC:
        return TorchContents(stream, first, {})
    for _ in range(2):  # The protocol's version, and what the system was like.
        read_pickle(bounded)
    root, keys = read_pickle(bounded), read_pickle(bounded)
    sizes = {str(found[2]): ITEM_SIZES.get(_STORAGES.get(found[1].name, ""), 1) for found in _storages(root)}
    ranges = {}
    for key in map(str, keys):
        count = int.from_bytes(stream.read(8), "little")
        size = count * sizes.get(key, 1)
        ranges[key] = _Range(stream.tell(), size)
        stream.seek(size, io.SEEK_CUR)
    return TorchContents(stream, root, ranges)


class _Bounded:
    """Lets no pickle ask for more than a pickle may have."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_PICKLE_BYTES:
            msg = f"it asks for {size} bytes at once; at most {MAX_PICKLE_BYTES} are read"
            raise CorruptError(msg)
        return self._stream.read(size)

    def readline(self) -> bytes:
        return self._stream.readline(MAX_PICKLE_BYTES)

    def tell(self) -> int:
        return self._stream.tell()


# What the pickle says


def _is_known(found: Global) -> bool:
    """Return whether plain containers or tensors need it: a name of torch's own for storages, dtypes and rebuilding."""
    if (found.module, found.name) in _PLAIN:
        return True
    is_rebuild = found.module == "torch._utils" and found.name.startswith("_rebuild_")
    is_type = found.module in ("torch", "torch.storage") and (
        found.name.endswith("Storage") or found.name in ITEM_SIZES
    )
    return is_rebuild or is_type or (found.module, found.name) == ("torch._tensor", "_rebuild_from_type_v2")


def _storages(root: Any) -> Iterator[tuple[Any, ...]]:
    for _, value in _leaves(root):
        call = _unwrapped(value)
        storage = call.args[0] if isinstance(call, Call) and isinstance(call.args, tuple) and call.args else None
        if isinstance(storage, Persistent) and _is_storage(storage.id):
            yield storage.id


def _is_storage(identity: Any) -> bool:
    return isinstance(identity, tuple) and len(identity) >= 5 and isinstance(identity[1], Global)


def _leaves(root: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield all that is no container, with its keys; what contains itself is entered once on each way to it."""
    count = 0
    todo: list[tuple[tuple[str, ...], Any, frozenset[int]]] = [((), root, frozenset())]
    while todo:
        path, value, above = todo.pop()
        count += 1
        if count > MAX_ENTRIES or len(path) > 100:
            msg = f"it holds more than {MAX_ENTRIES} entries, or is more than 100 deep: no checkpoint is"
            raise CorruptError(msg)
        children = None if _tensor(value) or id(value) in above else _children(value)
        if children is None:
            yield path, value
        else:
            inside = above | {id(value)}
            todo.extend(((*path, _key(key)), child, inside) for key, child in reversed(children))


def _key(key: Any) -> str:
    return (
        key if isinstance(key, str) else str(key) if isinstance(key, (int, float, bool)) else f"<{type(key).__name__}>"
    )


def _children(value: Any) -> list[tuple[Any, Any]] | None:
    """Return what a container holds; None for what is none, or holds numbers alone."""
    if isinstance(value, dict):
        return list(value.items()) or None
    if isinstance(value, (list, tuple)):
        # A list of ten thousand numbers is one thing.
        return None if all(_is_plain(item) for item in value) else list(enumerate(value))
    if not isinstance(value, Call) or not isinstance(value.what, Global) or scalar_of(value) is not None:
        return None
    kind = (value.what.module, value.what.name)
    if kind in _MAPPINGS:
        first = [pair for arg in _args(value) if isinstance(arg, dict) for pair in arg.items()]
        return [*first, *(pair for pair in value.items if isinstance(pair, tuple))]
    inside = [*_parts("args", value.args), *_parts("state", value.state), *(enumerate(value.items))]
    # What an object is made of is shown if there is a tensor in it.
    return [(key, part) for key, part in inside if not _is_plain(part)] or None


def _args(call: Call) -> tuple[Any, ...]:
    return call.args if isinstance(call.args, tuple) else ()


def _parts(name: str, value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, dict):
        return value.items()
    return enumerate(value) if isinstance(value, tuple) and name == "args" else [(name, value)] if value else []


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, bool, bytes, Global))


def _unwrapped(value: Any) -> Any:
    """Return the call that makes a tensor, out of those that make a parameter or a subclass of it."""
    for _ in range(8):
        if not isinstance(value, Call) or not isinstance(value.what, Global):
            return value
        args = _args(value)
        if value.what.name in _UNWRAPPED and args:
            value = args[0]
        elif value.what.name == "_rebuild_from_type_v2" and len(args) >= 3:
            value = Call(args[0], args[2])
        else:
            return value
    return value


def _tensor(value: Any) -> tuple[_View, str] | None:
    """Return what a tensor is, if the call makes one; None for anything else."""
    call = _unwrapped(value)
    if not isinstance(call, Call) or not isinstance(call.what, Global) or call.what.name not in _TENSORS:
        return None
    args = _args(call)
    if call.what.module != "torch._utils" or len(args) < 4 or not isinstance(args[0], Persistent):
        return None
    if not _is_storage(args[0].id):
        return None
    _, kind, key, *_ = args[0].id
    dtype = _STORAGES.get(kind.name, "uint8")
    if call.what.name == "_rebuild_tensor_v3" and len(args) > 6 and isinstance(args[6], Global):
        dtype = args[6].name
    offset, shape, stride = args[1], _ints(args[2]), _ints(args[3])
    is_sound = isinstance(offset, int) and offset >= 0 and shape is not None and stride is not None
    if not is_sound or len(shape or ()) != len(stride or ()):
        return None
    return _View(key=str(key), offset=offset, shape=shape or (), stride=stride or ()), dtype


def _ints(value: Any) -> tuple[int, ...] | None:
    if isinstance(value, Call) and isinstance(value.what, Global) and value.what.name == "Size" and _args(value):
        value = _args(value)[0]
    if isinstance(value, (tuple, list)) and all(isinstance(n, int) and 0 <= n < 1 << 62 for n in value):
        return tuple(value)
    return None


def _plain(value: Any) -> Any:
    """Return a leaf as it may be shown."""
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, Call):
        number = scalar_of(value)
        if number is not None:
            return number
        return f"<object by {value.what if isinstance(value.what, Global) else 'a call'}>"
    if isinstance(value, (list, tuple)) and len(value) <= 8 and all(_is_plain(item) for item in value):
        return [_plain(item) for item in value]
    if isinstance(value, (list, tuple, dict, set)):
        return f"<{type(value).__name__} of {len(value)}>"
    return f"<{value}>" if isinstance(value, Global) else f"<{type(value).__name__}>"
