"""Loads a safetensors file whose bytes are read once, each tensor into its final memory."""

from __future__ import annotations

from typing import Any, BinaryIO

import torch

from checkpointer.errors import CorruptError
from checkpointer.formats.archive_reader import Member, OtherLayoutError
from checkpointer.formats.inspection.safetensors_file import SafetensorsContents
from checkpointer.formats.inspection.tensors import ITEM_SIZES, dtype_named
from checkpointer.formats.mapped_memory import can_map
from checkpointer.formats.one_pass_memory import Layout
from checkpointer.formats.tensor_bytes import read_exactly


class SafetensorsLayout(Layout):
    """The layout of a safetensors file: its header, and then the tensors."""

    def __init__(self, stream: BinaryIO, contents: SafetensorsContents, *, is_mapped: bool) -> None:
        size = stream.seek(0, 2)
        super().__init__(stream, size, is_mapped=is_mapped)
        self._tensors = contents.tensors
        stream.seek(0)
        self._header = read_exactly(stream, contents.start, "its header")
        self._read_header = self._add_buffer(0, contents.start)
        begin = contents.start
        places = sorted(
            (begin + start, end - start, name) for name, (start, end) in contents.offsets.items() if start < end
        )
        members = [Member(name, start, start, size, crc=0) for start, size, name in places]
        if self._mapped is not None:
            self._storages = {one.name: self._mapped.storage[one.start : one.end] for one in members}
            self._add_pages(begin, size)
        else:
            self._place(members, begin, size)

    @classmethod
    def of(cls, stream: BinaryIO, *, is_mapped: bool) -> SafetensorsLayout | None:
        """See `TorchLayout.of`."""
        try:
            contents = SafetensorsContents(stream)
        except CorruptError:
            return None
        dtypes = {name: dtype_named(info.dtype) for name, info in contents.tensors.items()}
        is_aligned = all(
            (contents.start + start) % ITEM_SIZES.get(contents.tensors[name].dtype, 1) == 0
            for name, (start, _) in contents.offsets.items()
        )
        if None in dtypes.values() or any(contents.problems()) or (is_mapped and not (is_aligned and can_map())):
            return None
        return cls(stream, contents, is_mapped=is_mapped)

    def state(self, *, weights_only: bool, map_location: Any) -> Any:
        """See `Layout.state`. The file may have been replaced since its header was read."""
        if self._read_header != self._header:
            raise OtherLayoutError
        self._buffers.clear()  # Each is freed when its last member is taken.
        tensors = {name: self._tensor(name) for name in self._tensors}
        if map_location in (None, "cpu"):
            return tensors
        return {name: tensors.pop(name).to(map_location) for name in self._tensors}

    def _tensor(self, name: str) -> Any:
        info = self._tensors[name]
        tensor: Any = torch.empty(0, dtype=dtype_named(info.dtype), device="cpu")
        return tensor.set_(self.take(name, info.bytes), 0, info.shape)
