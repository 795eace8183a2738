"""Looks into a DCP folder through its metadata, by the reader that knows no classes but DCP's own."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import cached_property
from typing import Any, BinaryIO, cast

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from checkpointer.errors import CorruptError
from checkpointer.formats.inspection.dcp_metadata import bytes_of, folder_metadata
from checkpointer.formats.inspection.tensors import Branch, Leaf, Part, TensorInfo, Tensors, parts_in
from checkpointer.formats.inspection.torch_file import open_torch
from checkpointer.ports import Storage
from checkpointer.records.codec import METADATA


class DcpContents(Tensors):
    """An opened DCP folder. All of it is read through its storage."""

    def __init__(self, storage: Storage, name: str) -> None:
        super().__init__()
        self._storage = storage
        self._prefix = f"{name}/" if name else ""
        self._sizes = {path.removeprefix(self._prefix): stat.size for path, stat in storage.list(name).items()}
        """Bytes of each file."""
        with storage.open(self._prefix + METADATA) as stream:
            self.metadata = metadata = folder_metadata(stream, name or str(storage))
        for name, stored in metadata.state_dict_metadata.items():
            if isinstance(stored, TensorStorageMetadata):
                dtype = str(stored.properties.dtype).removeprefix("torch.")
                self.tensors[name] = TensorInfo(name=name, dtype=dtype, shape=tuple(stored.size))
            else:
                self.others[name] = "<pickled value>"
        if metadata.planner_data:
            self.parts = parts_in(self._tree(metadata.planner_data))
        elif self.tensors:
            self.parts = {"": Part(names={name: name for name in self.tensors})}

    def _tree(self, paths: Any) -> Branch:
        """Return the state as it was before DCP gave each entry one name."""
        tree = Branch("mapping")
        for name in (*self.tensors, *self.others):
            path = paths.get(name) if isinstance(paths, dict) else None
            *above, last = map(str, path) if isinstance(path, tuple) and path else (name,)
            branch = tree
            for key in above:
                below = branch.children.setdefault(key, Branch("mapping"))
                branch = below if isinstance(below, Branch) else branch
            branch.children.setdefault(last, Leaf(name, is_tensor=name in self.tensors))
        return tree

    def problems(self) -> Iterator[str]:
        """See `Tensors.problems`: files that end before what the metadata says lies in them."""
        for where, info in (self.metadata.storage_data or {}).items():
            size = self._sizes.get(info.relative_path, 0)
            if info.offset + info.length > size:
                yield f"{where.fqn} ends at byte {info.offset + info.length} of {info.relative_path}, which has {size}"
        claimed = sum(info.bytes for info in self.tensors.values())
        if claimed > self._held:
            yield f"its tensors have {claimed} bytes by the metadata, and its files have {self._held}"

    def _read(self, name: str) -> Any:
        stored = self.metadata.state_dict_metadata[name]
        assert isinstance(stored, TensorStorageMetadata)
        if bytes_of(stored) > self._held:
            msg = f"{name} has {bytes_of(stored)} bytes by the metadata, and the files have {self._held}"
            raise CorruptError(msg)
        tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
        for chunk in stored.chunks:
            shard = self._shard(self.metadata.storage_data[MetadataIndex(name, chunk.offsets)])
            target = narrow_tensor_by_index(tensor, chunk.offsets, chunk.sizes)
            if shard.size() != target.size():
                msg = f"a shard of {list(shard.size())} does not fit {list(target.size())}"
                raise CorruptError(msg)
            target.copy_(shard)
        return tensor

    def _shard(self, info: Any) -> torch.Tensor:
        """Return the tensor in some bytes of a file."""
        if info.offset + info.length > self._sizes.get(info.relative_path, 0):
            msg = f"{info.relative_path} ends before byte {info.offset + info.length}"
            raise CorruptError(msg)
        if info.transform_descriptors:
            msg = f"it was written through {info.transform_descriptors}, which is not undone here"
            raise CorruptError(msg)
        with self._storage.open(self._prefix + info.relative_path) as stream:
            return cast(torch.Tensor, open_torch(cast(BinaryIO, Slice(stream, info.offset, info.length))).state())

    @cached_property
    def _held(self) -> int:
        named = {info.relative_path for info in (self.metadata.storage_data or {}).values()}
        return sum(self._sizes.get(name, 0) for name in named)

    def value(self, name: str) -> Any:
        """See `Tensors.value`: what is pickled stays so."""
        return None


class Slice(io.RawIOBase):
    """Some bytes of a file: an item of a DCP folder."""

    def __init__(self, stream: BinaryIO, start: int, length: int) -> None:
        self._stream = stream
        self._start = start
        self._length = length
        stream.seek(start)

    def tell(self) -> int:
        """See `io.RawIOBase`."""
        return self._stream.tell() - self._start

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """See `io.RawIOBase`."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self._length}[whence]
        return self._stream.seek(self._start + max(base + offset, 0)) - self._start

    def readinto(self, buffer: Any) -> int:
        """See `io.RawIOBase`."""
        data = self._stream.read(min(len(buffer), max(self._length - self.tell(), 0)))
        buffer[: len(data)] = data
        return len(data)
