"""Looks into a DCP folder through its metadata, by the reader that knows no classes but DCP's own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from checkpointer.errors import RestoreError
from checkpointer.formats.dcp_folder import _as_they_are, _Reader
from checkpointer.formats.inspection.tensors import TensorInfo
from checkpointer.formats.inspection.weight_sets import Branch, Leaf, flat, parts_in

__all__ = ["DcpContents"]


class DcpContents:
    """An opened DCP folder of this machine, see `Tensors`.

    Raises:
        CorruptError: If it is none.
        UnsafePayloadError: If its metadata names anything but DCP's own classes.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self.metadata = metadata = _Reader(path).read_metadata()
        self.tensors: dict[str, TensorInfo] = {}
        self.others: dict[str, Any] = {}
        self.calls: tuple[str, ...] = ()
        for name, stored in metadata.state_dict_metadata.items():
            if isinstance(stored, TensorStorageMetadata):
                dtype = str(stored.properties.dtype).removeprefix("torch.")
                self.tensors[name] = TensorInfo(name=name, dtype=dtype, shape=tuple(stored.size))
            else:
                self.others[name] = "<pickled value>"
        self.parts = (
            parts_in(self._tree(metadata.planner_data))
            if metadata.planner_data
            else flat({name: name for name in self.tensors})
        )

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
        """Yield which files end before what the metadata says lies in them."""
        for where, info in (self.metadata.storage_data or {}).items():
            path = os.path.join(self._path, info.relative_path)
            size = os.path.getsize(path) if os.path.exists(path) else 0
            if info.offset + info.length > size:
                yield f"{where.fqn} ends at byte {info.offset + info.length} of {info.relative_path}, which has {size}"

    def read(self, name: str) -> Any:
        """See `Tensors.read`: puts the shards together."""
        info = self.tensors[name]
        state = {name: torch.empty(info.shape, dtype=getattr(torch, info.dtype))}
        reader = _Reader(self._path)
        try:
            with _as_they_are(RestoreError):
                load(state, storage_reader=reader, planner=DefaultLoadPlanner(), no_dist=True)
        except RestoreError as error:
            raise reader.error or error from None
        return state[name]

    def value(self, name: str) -> Any:
        """See `Tensors.value`: what is pickled stays so."""
        return None

    def close(self) -> None:
        """See `Tensors.close`."""
