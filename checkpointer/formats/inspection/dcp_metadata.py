"""Reads the metadata of a DCP folder as data: no class is called, and nothing is allocated but what is there."""

from __future__ import annotations

import dataclasses
import io
import math
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO, Final, cast

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from checkpointer._validation import brief
from checkpointer.errors import CorruptError, NamingError, RestoreError, UnsafePayloadError
from checkpointer.formats.inspection.pickle import MAX_SAME_HASHES, Call, Global, Persistent, read_made
from checkpointer.formats.inspection.tensors import MAX_ELEMENTS, as_shape, as_sizes
from checkpointer.formats.inspection.work_limit import Work
from checkpointer.records.names import check_name

ITEM_DIGEST: Final = "checkpointer_digest"
"""Attribute of an item's ``_StorageInfo``, which DCP's own reader ignores: see `checkpointer.formats.dcp_writer`."""
MAX_METADATA_BYTES: Final = 1 << 30
MAX_LEVELS: Final = 64
"""Keys on the way to an entry of the state."""
MAX_LIST: Final = 1_000_000
"""Items of all lists in the state: an index says how many there are before it."""
_DCP: Final = "torch.distributed.checkpoint"
_PATHS: Final = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
_CLASSES: Final = {
    *((module, name) for module in ("pathlib", "pathlib._local") for name in _PATHS),  # The latter is Python 3.13's.
    *((f"{_DCP}.metadata", name) for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata")),
    *((f"{_DCP}.metadata", name) for name in ("ChunkStorageMetadata", "MetadataIndex", "TensorProperties")),
    *((f"{_DCP}.metadata", name) for name in ("StorageMeta", "_MEM_FORMAT_ENCODING")),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}
"""All classes and functions that DCP's own metadata names, besides dtypes."""


def read_dcp_metadata(stream: BinaryIO) -> Metadata:
    """Return the metadata of a DCP folder from its file.

    Raises:
        CorruptError: If a value is not what DCP writes there; the message has its place.
        UnsafePayloadError: If it names a class that DCP does not write.
    """
    size = stream.seek(0, io.SEEK_END)
    if size > MAX_METADATA_BYTES:
        msg = f"its metadata has {size} bytes; at most {MAX_METADATA_BYTES} are read"
        raise CorruptError(msg)
    stream.seek(0)
    root, made = read_made(stream, Work.for_bytes(size))
    for one in made:
        _check_known(one.what if isinstance(one, Call) else one)
    fields = _fields(root, "Metadata", "the metadata")
    states = _dict(fields, "state_dict_metadata")
    for name in states:
        if not isinstance(name, str):
            raise _bad(name, "a name in state_dict_metadata", "text")
    version = fields["version"] if isinstance(fields.get("version"), str) else None
    known = {field.name for field in dataclasses.fields(Metadata)}
    return Metadata(
        **({"version": version} if "version" in known else {}),  # Not in torch 2.7.
        state_dict_metadata={name: _stored(value, repr(name)[:200]) for name, value in states.items()},
        planner_data=None if fields.get("planner_data") is None else _paths(_dict(fields, "planner_data")),
        storage_data=_places(_dict(fields, "storage_data")),
    )


def _check_known(found: Any) -> None:
    if isinstance(found, Persistent) or not isinstance(found, Global):
        msg = "its metadata refers to something outside of it, or calls what is not a class"
        raise CorruptError(msg)
    is_dtype = found.module == "torch" and isinstance(getattr(torch, found.name, None), torch.dtype)
    if not is_dtype and (found.module, found.name) not in _CLASSES:
        msg = (
            f"the metadata names {found}, which a safe load refuses to unpickle; "
            "if you trust its writer, pass weights_only=False"
        )
        raise UnsafePayloadError(msg)


def _bad(value: Any, place: str, expected: str) -> CorruptError:
    return CorruptError(f"its metadata says {brief(value)} for {place}; expected {expected}")


def _fields(value: Any, kind: str, place: str) -> Mapping[str, Any]:
    """Return the fields of an object of a class of DCP."""
    if isinstance(value, Call) and isinstance(value.what, Global) and value.what.name == kind:
        state = {} if value.state is None else value.state
        if isinstance(state, dict) and all(isinstance(name, str) for name in state):
            return state
    raise _bad(value, place, f"a {kind}")


def _dict(fields: Mapping[str, Any], name: str) -> dict[Any, Any]:
    value = fields.get(name)
    if type(value) is not dict:
        raise _bad(value, name, "a dict")
    return value


def _size(read: Callable[[Any], tuple[int, ...] | None], value: Any, place: str, expected: str) -> torch.Size:
    found = read(value)
    if found is None:
        raise _bad(value, place, expected)
    return torch.Size(found)


def _whole(value: Any, place: str) -> int:
    if type(value) is int and 0 <= value <= MAX_ELEMENTS:
        return value
    raise _bad(value, place, "a whole number of at least 0")


# The entries of the state


def _stored(value: Any, place: str) -> TensorStorageMetadata | BytesStorageMetadata:
    if isinstance(value, Call) and isinstance(value.what, Global) and value.what.name == "BytesStorageMetadata":
        return BytesStorageMetadata()
    fields = _fields(value, "TensorStorageMetadata", place)
    size = _size(as_shape, fields.get("size"), f"the size of {place}", "a shape")
    chunks = fields.get("chunks")
    if not isinstance(chunks, list):
        raise _bad(chunks, f"the chunks of {place}", "a list")
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=_dtype(fields.get("properties"), place)),
        size=size,
        chunks=[_chunk(chunk, len(size), place) for chunk in chunks],
    )


def _dtype(value: Any, place: str) -> torch.dtype:
    match value:
        case Call(what=Global(name="TensorProperties"), state=(Global(module="torch", name=name), *_)):
            found = getattr(torch, name, None)
            if isinstance(found, torch.dtype):
                return found
    raise _bad(value, f"the properties of {place}", "a dtype and four more")


def _chunk(value: Any, dimensions: int, place: str) -> ChunkStorageMetadata:
    fields = _fields(value, "ChunkStorageMetadata", f"a chunk of {place}")
    sizes = _size(as_shape, fields.get("sizes"), f"a chunk of {place}", "a shape")
    offsets = _size(as_sizes, fields.get("offsets"), place, "offsets")
    if not len(sizes) == len(offsets) == dimensions:
        raise _bad((offsets, sizes), f"a chunk of {place}", f"{dimensions} offsets and sizes")
    return ChunkStorageMetadata(offsets=offsets, sizes=sizes)


# Where they lie in the state, and their bytes in the files


def _paths(paths: Mapping[Any, Any]) -> dict[str, tuple[str | int, ...]]:
    found: dict[str, tuple[str | int, ...]] = {}
    for name, path in paths.items():
        is_path = isinstance(path, tuple) and 0 < len(path) <= MAX_LEVELS
        if not isinstance(name, str) or not is_path or not all(_is_key(key) for key in path):
            raise _bad(path, f"the path of {brief(name)}", f"at most {MAX_LEVELS} keys, each text or a list index")
        found[name] = path
    _check_lists(found.values())
    return found


def _is_key(key: Any) -> bool:
    return isinstance(key, str) or (type(key) is int and 0 <= key < MAX_LIST)


def _check_lists(paths: Iterable[tuple[str | int, ...]]) -> None:
    """Raise if the list indices stand for more items than `MAX_LIST`."""
    top: dict[str | int, Any] = {}
    for path in paths:
        node = top
        for key in path:
            node = node.setdefault(key, {})
    items, todo = 0, [top]
    while todo:
        node = todo.pop()
        todo.extend(node.values())
        items += max((key + 1 for key in node if isinstance(key, int)), default=0)
    if items > MAX_LIST:
        msg = f"its metadata has a list index for each of {items} items; expected at most {MAX_LIST}"
        raise CorruptError(msg)


def _places(places: Mapping[Any, Any]) -> dict[MetadataIndex, _StorageInfo]:
    found: dict[MetadataIndex, _StorageInfo] = {}
    hashes: Counter[int] = Counter()
    for key, value in places.items():
        fields = _fields(key, "MetadataIndex", "a key of storage_data")
        name, offset, index = fields.get("fqn"), fields.get("offset"), fields.get("index")
        if not isinstance(name, str):
            raise _bad(name, "a name in storage_data", "text")
        place = MetadataIndex(
            name,
            None if offset is None else _size(as_sizes, offset, f"the offset of {name!r:.200}", "offsets"),
            None if index is None else _whole(index, f"the index of {name!r:.200}"),
        )
        hashes[hash(place)] += 1
        if hashes[hash(place)] > MAX_SAME_HASHES:
            msg = f"more than {MAX_SAME_HASHES} entries of its metadata have one hash; no folder's have"
            raise CorruptError(msg)
        found[place] = _info(value, f"{name!r:.200}")
    return found


def _info(value: Any, place: str) -> _StorageInfo:
    fields = _fields(value, "_StorageInfo", f"the place of {place}")
    path, more = fields.get("relative_path"), fields.get("transform_descriptors")
    if isinstance(path, Call) and isinstance(path.what, Global) and path.what.name in _PATHS:
        path = "/".join(map(str, path.args)) if all(isinstance(part, str) for part in path.args) else None
    if not isinstance(path, str):
        raise _bad(path, f"the file of {place}", "a path")
    if more is not None and not (isinstance(more, (list, tuple)) and all(isinstance(text, str) for text in more)):
        raise _bad(more, f"the transforms of {place}", "a list of texts")
    found = _StorageInfo(
        relative_path=check_name(path),
        offset=_whole(fields.get("offset"), f"the offset of {place}"),
        length=_whole(fields.get("length"), f"the length of {place}"),
        transform_descriptors=more or None,
    )
    digest = fields.get(ITEM_DIGEST)
    if isinstance(digest, str):
        setattr(found, ITEM_DIGEST, digest)
    return found


# The folder


def folder_metadata(stream: BinaryIO, folder: str, *, weights_only: bool = True) -> Metadata:
    """Return the metadata of a DCP folder. An error names the folder."""
    try:
        metadata = read_dcp_metadata(stream) if weights_only else pickle.load(stream)
        _check_folder(metadata)
    except CorruptError as error:
        msg = f"{folder}: {error}"
        raise CorruptError(msg) from error
    except (OSError, MemoryError, RestoreError):
        raise
    except NamingError as error:
        msg = f"{folder}: its metadata names a file outside of it: {error}"
        raise CorruptError(msg) from error
    except Exception as error:  # Damaged bytes fail anywhere in an unpickler.
        msg = f"{folder}: its metadata cannot be read: {type(error).__name__}: {error}"
        raise CorruptError(msg) from error
    return cast(Metadata, metadata)


def bytes_of(stored: TensorStorageMetadata) -> int:
    """Return how many bytes a tensor takes."""
    return math.prod(stored.size) * stored.properties.dtype.itemsize


def _check_folder(metadata: Metadata) -> None:
    """Raise unless the metadata stays inside its folder, and names all of each tensor."""
    for name, stored in metadata.state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata):
            here, all_ = sum(math.prod(chunk.sizes) for chunk in stored.chunks), math.prod(stored.size)
            if here < all_:
                msg = f"it holds {here} of the {all_} elements of {name}: the shards of other processes are missing"
                raise CorruptError(msg)
    for info in metadata.storage_data.values():
        check_name(info.relative_path)
