"""Loads a safetensors file whose bytes are read once, each tensor into its final memory."""

from __future__ import annotations

from typing import Any, BinaryIO

from checkpointer.errors import CorruptError
from checkpointer.formats.archive_reader import OtherLayoutError
from checkpointer.formats.inspection.safetensors_file import SafetensorsContents
from checkpointer.formats.inspection.tensors import ITEM_SIZES, dtype_named
from checkpointer.formats.mapped_memory import can_map
from checkpointer.formats.one_pass_memory import PIECE, SMALL, Layout, new_storage
from checkpointer.formats.tensor_bytes import memory_at, read_exactly


class SafetensorsLayout(Layout):
    """The layout of a safetensors file: its header, and then the tensors."""

    def __init__(self, stream: BinaryIO, contents: SafetensorsContents, *, is_mapped: bool) -> None:
        size = stream.seek(0, 2)
        super().__init__(stream, size, is_mapped=is_mapped)
        self._tensors = contents.tensors
        stream.seek(0)
        self._header = read_exactly(stream, contents.start, "its header")
        self._read_header = self._add_buffer(0, contents.start)
        self._storages: dict[str, Any] = {}
        """Storages by the name of their tensor."""
        self._small: dict[str, memoryview] = {}
        """The bytes of all other tensors."""
        begin = contents.start
        places = {name: (begin + start, begin + end) for name, (start, end) in contents.offsets.items() if start < end}
        if self._mapped is not None:
            self._storages = {name: self._mapped.storage[start:end] for name, (start, end) in places.items()}
            self._add_pages(begin, size)
        else:
            self._place(sorted((*place, name) for name, place in places.items()), begin, size)

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

    def _place(self, places: list[tuple[int, int, str]], start: int, size: int) -> None:
        """Add memory for all tensors, in their order in the file. ``start`` is where the first may begin."""
        small = list[tuple[int, int, str]]()
        for begin, end, name in places:
            if end - begin >= SMALL:
                self._add_small(start, begin, small)
                self._storages[name] = self._add_storage(begin, end - begin)
                start, small = end, []
                continue
            if small and end - start > PIECE:
                self._add_small(start, begin, small)
                start, small = begin, []
            small.append((begin, end, name))
        self._add_small(start, size, small)

    def _add_small(self, start: int, end: int, places: list[tuple[int, int, str]]) -> None:
        buffer = self._add_buffer(start, end)
        for begin, finish, name in places:
            self._small[name] = buffer[begin - start : finish - start]

    def state(self, *, weights_only: bool, map_location: Any) -> Any:
        """See `Layout.state`. The file may have been replaced since its header was read."""
        if self._read_header != self._header:
            raise OtherLayoutError
        tensors = {name: self._tensor(name) for name in self._tensors}
        if map_location in (None, "cpu"):
            return tensors
        return {name: tensors.pop(name).to(map_location) for name in self._tensors}

    def _tensor(self, name: str) -> Any:
        import torch

        info = self._tensors[name]
        small = self._small.pop(name, None)
        storage = self._storages.pop(name) if small is None and info.bytes else new_storage(info.bytes)
        if small is not None:
            memory_at(storage.data_ptr(), info.bytes)[:] = small
        tensor: Any = torch.empty(0, dtype=dtype_named(info.dtype), device="cpu")
        return tensor.set_(storage, 0, info.shape)
