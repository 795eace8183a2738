"""Looks into a DCP folder through its metadata, by the reader that knows no classes but DCP's own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from checkpointer.errors import CorruptError
from checkpointer.formats.inspection.dcp_reader import Reader, StoredFiles, bytes_of, expect_no_group
from checkpointer.formats.inspection.tensors import Branch, Leaf, Part, TensorInfo, Tensors, parts_in
from checkpointer.ports import Storage


class DcpContents(Tensors):
    """An opened DCP folder. All of it is read through its storage."""

    def __init__(self, storage: Storage, name: str) -> None:
        super().__init__()
        expect_no_group()
        self._files = files = StoredFiles(storage, name)
        self._reader = Reader(name or str(storage))
        self._reader.fs = files
        self.metadata = metadata = self._reader.read_metadata()
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
            size = self._files.sizes.get(info.relative_path, 0)
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
        state = {name: torch.empty(stored.size, dtype=stored.properties.dtype)}
        self._reader.load_into(state, DefaultLoadPlanner(), no_dist=True)
        return state[name]

    @cached_property
    def _held(self) -> int:
        named = {info.relative_path for info in (self.metadata.storage_data or {}).values()}
        return sum(self._files.sizes.get(name, 0) for name in named)

    def value(self, name: str) -> Any:
        """See `Tensors.value`: what is pickled stays so."""
        return None
