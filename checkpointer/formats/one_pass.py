"""Loads a torch file whose bytes are read once, each storage into its final memory, and unpickles it afterwards."""

from __future__ import annotations

import functools
import inspect
import io
import itertools
import os
import pickle
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any, BinaryIO, Final

from checkpointer.errors import CorruptError
from checkpointer.formats.archive_reader import Archive, Member, OtherLayoutError, agrees
from checkpointer.formats.inspection.torch_file import check_pickle
from checkpointer.formats.mapping import HUGE_PAGE, MappedFile, can_map, use_huge_pages
from checkpointer.formats.memory import memory_at, read_exactly
from checkpointer.formats.refusals import raising_unreadable

_PIECE: Final = 4 << 20
"""Bytes of a piece at most. It is still in the processor's cache when it is digested."""
_MAPPED_PIECE: Final = 32 << 20
"""Nothing is copied, so the cache does not matter. With many pieces the threads wait for each other many times."""
_SMALL: Final = 1 << 16
"""Storages of fewer bytes are read together with their neighbours, and copied."""
_PICKLE: Final = "data.pkl"
_DATA: Final = "data/"
_PARAMETERS: Final = ("zip_file", "map_location", "pickle_module")


@functools.cache
def can_unpickle() -> bool:
    """Return whether the installed torch has the functions that this module calls. They are private."""
    import torch

    load = getattr(torch.serialization, "_load", None)
    parameters = tuple(inspect.signature(load).parameters) if load is not None else ()
    return parameters[:3] == _PARAMETERS and hasattr(torch.serialization, "_weights_only_unpickler")


class TorchLayout:
    """Memory for each byte of a torch file that is read once, front to back, each byte into its final place."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._storages: dict[str, Any] = {}
        """Storages by the name of their member."""
        self._small: dict[str, memoryview] = {}
        """The content of all other members."""
        self._headers: list[tuple[Member, memoryview, int]] = []
        """Each member, a buffer that has its header, and where the header begins there."""
        self._directory = memoryview(b"")
        self._mapped: MappedFile | None = None
        self._on_pages: set[int] = set()
        """Which pieces are pages of the mapped file."""
        self.pieces: list[tuple[int, memoryview]] = []
        """Offsets in the file, and buffers for the bytes from there on. Together they are the whole file, in order."""

    @classmethod
    def of(cls, stream: BinaryIO, *, is_mapped: bool) -> TorchLayout | None:
        """Return the layout of a torch file; None if it must be read in another way, or is damaged.

        With ``is_mapped``, the stream is a file on this machine. Its storages are the file's own pages, and all else is
        read now.
        """
        archive = _archive_of(stream) if can_unpickle() and (can_map() or not is_mapped) else None
        if archive is None:
            return None
        layout = cls(archive)
        if is_mapped:
            layout._map(stream, MappedFile(stream, archive.size))
        else:
            layout._place()
        return layout

    # Where the bytes go

    def _place(self) -> None:
        start, members = 0, list[Member]()
        for member in self._archive.members:
            if _is_storage(member) and member.size >= _SMALL:
                self._add_private(start, member.start, members, member)
                storage = _new_storage(member.size)
                self._storages[member.name] = storage
                address = storage.data_ptr()
                # The pieces end at multiples of a page, so that two threads do not make the same page.
                first = -address % HUGE_PAGE
                memory = memory_at(address, member.size, storage)
                self._add(member.start, memory[:first])
                self._add(member.start + first, memory[first:])
                start, members = member.end, []
                continue
            if members and member.end - start > _PIECE:
                self._add_private(start, member.header, members)
                start, members = member.header, []
            members.append(member)
        self._add_private(start, self._archive.size, members)

    def _map(self, stream: BinaryIO, mapped: MappedFile) -> None:
        self._mapped = mapped
        directory = self._archive.size - len(self._archive.directory)
        groups = [(kind, [*group]) for kind, group in itertools.groupby(self._archive.members, _is_storage)]
        ends = [group[0].header for _, group in groups[1:]] + [directory]
        for (is_mapped, group), start, end in zip(groups, [0, *ends], ends, strict=False):
            if is_mapped:
                for member in group:
                    self._storages[member.name] = mapped.storage[member.start : member.end]
                    self._headers.append((member, mapped.memory, member.header))
                first = len(self.pieces)
                self._add(start, mapped.memory[start:end], _MAPPED_PIECE)
                self._on_pages.update(range(first, len(self.pieces)))
            else:
                self._read_private(stream, start, end, group)
        self._read_private(stream, directory, self._archive.size, [])

    def _read_private(self, stream: BinaryIO, start: int, end: int, members: Sequence[Member]) -> None:
        first = len(self.pieces)
        self._add_private(start, end, members)
        for offset, view in self.pieces[first:]:
            stream.seek(offset)
            view[:] = read_exactly(stream, len(view), "the file")

    def _add_private(self, start: int, end: int, members: Sequence[Member], last: Member | None = None) -> None:
        """Add a buffer for a range, which has some members from header to end, and the header of ``last`` alone."""
        buffer = memoryview(bytearray(end - start))
        for member in members:
            self._small[member.name] = buffer[member.start - start : member.end - start]
        for member in (*members, *([last] if last else ())):
            self._headers.append((member, buffer, member.header - start))
        self._directory = buffer[max(0, len(buffer) - len(self._archive.directory)) :]
        self._add(start, buffer)

    def _add(self, start: int, view: memoryview, step: int = _PIECE) -> None:
        for offset in range(0, len(view), step):
            self.pieces.append((start + offset, view[offset : offset + step]))

    def populate(self, number: int) -> None:
        """Bring the piece of that number into memory if it is a part of the mapped file. Raises `OSError` as a read."""
        offset, view = self.pieces[number]
        if self._mapped is not None and number in self._on_pages:
            self._mapped.populate(offset, len(view))

    def state(self, *, weights_only: bool, map_location: Any) -> Any:
        """Return the state as `Format.read` does, after all pieces are filled and verified. Call it once.

        Raises:
            OtherLayoutError: If the bytes lie in another way than the directory made expect.
            CorruptError, UnsafePayloadError: As `Format.read`.
        """
        import torch

        if self._directory != self._archive.directory or not all(itertools.starmap(agrees, self._headers)):
            raise OtherLayoutError
        if not weights_only and os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD"):  # torch.load knows what it means.
            raise OtherLayoutError
        reader = _Reader(self._archive.members, self._storages, self._small)
        serialization: Any = torch.serialization
        module = serialization._weights_only_unpickler if weights_only else pickle
        with raising_unreadable(self._pickle, weights_only=weights_only):
            if weights_only:
                sizes = {member.name.removeprefix(_DATA): member.size for member in self._archive.members}
                check_pickle(self._small[_PICKLE], sizes)
            try:
                state = serialization._load(reader, map_location, module, encoding="utf-8")
                reader.check_sizes()
                return state
            except pickle.UnpicklingError as error:
                raise pickle.UnpicklingError(str(error)) from None

    def _pickle(self) -> BinaryIO:
        """Return a torch file with the same pickle and no tensors; an empty file if the pickle is damaged."""
        data = self._small[_PICKLE]
        crc = next(member.crc for member in self._archive.members if member.name == _PICKLE)
        file = io.BytesIO()
        if not crc or zlib.crc32(data) == crc:
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr(f"archive/{_PICKLE}", bytes(data))
        file.seek(0)
        return file


class _Reader:
    """Does what the file reader of torch does. It hands out each storage once, and no longer holds it then."""

    def __init__(self, members: Sequence[Member], storages: dict[str, Any], small: dict[str, memoryview]) -> None:
        self._members = {member.name: member for member in members}
        self._storages = storages
        self._small = small
        self._taken: list[tuple[str, Any, int]] = []
        """Name, weak reference and size of each storage that was handed out: one that moved to a device is freed."""

    def check_sizes(self) -> None:
        """Raise `CorruptError` if a tensor has needed more bytes than its storage has. torch makes it larger then."""
        import torch

        for name, reference, size in self._taken:
            storage: Any = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)  # None if it is freed.
            if storage is not None and storage.nbytes() != size:
                msg = f"a tensor needs {storage.nbytes()} bytes of {name}, which has {size}"
                raise CorruptError(msg)

    def __getattr__(self, name: str) -> Any:
        # A later torch may call more than there is here.
        raise OtherLayoutError(name)

    def has_record(self, name: str) -> bool:
        return name in self._members

    def get_record(self, name: str) -> bytes:
        return bytes(self._small[name])

    def get_record_offset(self, name: str) -> int:
        return self._members[name].start

    def get_record_header_offset(self, name: str) -> int:
        return self._members[name].header

    def get_record_offset_no_read(self, cursor: int, name: str, size: int, alignment: int) -> int:
        return self._members[name].start

    def serialization_id(self) -> str:
        name = ".data/serialization_id"
        return self.get_record(name).decode() if self.has_record(name) else ""

    def get_storage_from_record(self, name: str, size: int, kind: object) -> _Taken:
        has = self._members[name].size
        if size > has:
            msg = f"a tensor needs {size} bytes of {name}, which has {has}"
            raise CorruptError(msg)
        from torch.multiprocessing.reductions import StorageWeakRef

        storage = self._storages.pop(name, None)
        if storage is None:
            storage = _new_storage(size)
            if size:  # torch asks again for a storage that has no memory.
                memory_at(storage.data_ptr(), size)[:] = self._small.pop(name)[:size]
        taken = storage if storage.nbytes() == size else storage[:size]
        self._taken.append((name, StorageWeakRef(taken), size))  # type: ignore[no-untyped-call]
        return _Taken(taken)


class _Taken:
    """Stands for the tensor that a reader of torch returns."""

    def __init__(self, storage: Any) -> None:
        self._untyped_storage = storage

    def _typed_storage(self) -> _Taken:
        return self


def _new_storage(size: int) -> Any:
    import torch

    kind: Any = torch.UntypedStorage  # It has no default device, unlike torch.empty.
    storage = kind(size, device="cpu")
    if size >= HUGE_PAGE:
        use_huge_pages(storage.data_ptr(), size)
    return storage


def _is_storage(member: Member) -> bool:
    return member.name.startswith(_DATA)


def _archive_of(stream: BinaryIO) -> Archive | None:
    def read(offset: int, length: int) -> bytes:
        stream.seek(offset)
        return bytes(read_exactly(stream, length, "its directory"))

    archive = Archive.of(read, stream.seek(0, io.SEEK_END))
    stream.seek(0)
    return archive
