"""Memory for each byte of a file that is read once, front to back, each byte into its final place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, BinaryIO, Final

import torch

from checkpointer.formats.archive_reader import Member
from checkpointer.formats.mapped_memory import HUGE_PAGE, MappedFile, use_huge_pages
from checkpointer.formats.tensor_bytes import memory_at, read_exactly

PIECE: Final = 4 << 20
"""Bytes of a piece at most. It is still in the processor's cache when it is digested."""
MAPPED_PIECE: Final = 32 << 20
"""Nothing is copied, so the cache does not matter. With many pieces the threads wait for each other many times."""
SMALL: Final = 1 << 16
"""Storages of fewer bytes are read together with their neighbours, and copied."""


class Layout:
    """Buffers for a whole file. After they are filled and verified, a subclass makes the state of them."""

    def __init__(self, stream: BinaryIO, size: int, *, is_mapped: bool) -> None:
        self._stream = stream
        self._mapped = MappedFile(stream, size) if is_mapped else None
        self.pieces: list[tuple[int, memoryview]] = []
        """Offsets in the file, and buffers for the bytes from there on. Together they are the whole file, in order."""
        self._storages: dict[str, Any] = {}
        """Storages by the name of their member."""
        self._small: dict[str, memoryview] = {}
        """The content of all other members."""
        self._buffers: list[tuple[int, memoryview, Sequence[Member]]] = []
        """Buffers, where each begins in the file, and the members whose headers it has."""

    def populate(self, number: int) -> None:
        """Bring the pages of that piece into memory if the file is mapped. Raises `OSError` as a read."""
        offset, view = self.pieces[number]
        if self._mapped is not None:
            self._mapped.populate(offset, len(view))

    def state(self, *, weights_only: bool, map_location: Any) -> Any:
        """Return the state as `Format.read` does, after all pieces are filled and verified. Call it once.

        Raises:
            OtherLayoutError: If the bytes lie in another way than was expected.
            CorruptError, UnsafePayloadError: As `Format.read`.
        """
        raise NotImplementedError

    def take(self, name: str, size: int) -> Any:
        """Return a storage with the first ``size`` bytes of a member, and no longer hold it: once a name."""
        storage = self._storages.pop(name, None)
        if storage is None:
            storage = new_storage(size)
            if size:  # torch asks again for a storage that has no memory.
                memory_at(storage.data_ptr(), size)[:] = self._small.pop(name)[:size]
        return storage

    def _place(
        self, members: Iterable[Member], start: int, end: int, is_storage: Callable[[Member], bool] = lambda _: True
    ) -> None:
        """Add memory for a range of bytes: large storages get their own, and what lies between them shares buffers."""
        group = list[Member]()
        for member in members:
            if member.size >= SMALL and is_storage(member):
                self._add_buffer(start, member.start, [*group, member])
                self._storages[member.name] = self._add_storage(member.start, member.size)
                start, group = member.end, []
            elif group and member.end - start > PIECE:
                self._add_buffer(start, member.header, group)
                start, group = member.header, [member]
            else:
                group.append(member)
        self._add_buffer(start, end, group)

    def _add(self, start: int, view: memoryview, step: int = PIECE) -> None:
        for offset in range(0, len(view), step):
            self.pieces.append((start + offset, view[offset : offset + step]))

    def _add_storage(self, start: int, size: int) -> Any:
        """Add new memory for a range of bytes, and return it as a storage."""
        storage = new_storage(size)
        address = storage.data_ptr()
        # The pieces end at multiples of a page, so that two threads do not make the same page.
        first = -address % HUGE_PAGE
        memory = memory_at(address, size, storage)
        self._add(start, memory[:first])
        self._add(start + first, memory[first:])
        return storage

    def _add_buffer(self, start: int, end: int, members: Sequence[Member] = ()) -> memoryview:
        """Add a buffer for a range of bytes, which has some members, or the header alone of the last one.

        Of a mapped file the bytes are read now.
        """
        buffer = memoryview(bytearray(end - start))
        if self._mapped is not None and buffer:
            self._stream.seek(start)
            buffer[:] = read_exactly(self._stream, len(buffer), "the file")
        self._add(start, buffer)
        self._buffers.append((start, buffer, members))
        self._small |= {one.name: buffer[one.start - start : one.end - start] for one in members if one.end <= end}
        return buffer

    def _add_pages(self, start: int, end: int) -> None:
        """Add a range of bytes of the mapped file, as they are there."""
        assert self._mapped is not None, "the file is mapped"
        self._add(start, self._mapped.memory[start:end], MAPPED_PIECE)


def new_storage(size: int) -> Any:
    """Return memory on the CPU, with huge pages if it is large."""
    kind: Any = torch.UntypedStorage  # It has no default device, unlike torch.empty.
    storage = kind(size, device="cpu")
    if size >= HUGE_PAGE:
        use_huge_pages(storage.data_ptr(), size)
    return storage
