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
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO, Final

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from checkpointer.errors import CorruptError
from checkpointer.formats.archive_reader import Archive, Member, OtherLayoutError, agrees
from checkpointer.formats.inspection.torch_file import check_pickle
from checkpointer.formats.mapped_memory import MappedFile, can_map
from checkpointer.formats.one_pass_memory import Layout
from checkpointer.formats.torch_load_errors import raising_unreadable

_PICKLE: Final = "data.pkl"
_DATA: Final = "data/"
_PARAMETERS: Final = ("zip_file", "map_location", "pickle_module")


@functools.cache
def can_unpickle() -> bool:
    """Return whether the installed torch has the functions that this module calls. They are private."""
    load = getattr(torch.serialization, "_load", None)
    parameters = tuple(inspect.signature(load).parameters) if load is not None else ()
    return parameters[:3] == _PARAMETERS and hasattr(torch.serialization, "_weights_only_unpickler")


class TorchLayout(Layout):
    """The layout of a torch file. All but its storages is unpickled or copied in the end."""

    def __init__(self, stream: BinaryIO, archive: Archive, *, is_mapped: bool) -> None:
        super().__init__(stream, archive.size, is_mapped=is_mapped)
        self._archive = archive
        if self._mapped is not None:
            self._map(self._mapped)
        else:
            self._place(archive.members, 0, archive.size, _is_storage)

    @classmethod
    def of(cls, stream: BinaryIO, *, is_mapped: bool) -> TorchLayout | None:
        """Return the layout of a torch file; None if it must be read in another way, or is damaged.

        With ``is_mapped``, the stream is a file on this machine. Its storages are the file's own pages, and all else is
        read now.
        """
        archive = Archive.of(stream) if can_unpickle() and (can_map() or not is_mapped) else None
        stream.seek(0)
        return cls(stream, archive, is_mapped=is_mapped) if archive is not None else None

    def _map(self, mapped: MappedFile) -> None:
        directory = self._archive.size - len(self._archive.directory)
        groups = [(kind, [*group]) for kind, group in itertools.groupby(self._archive.members, _is_storage)]
        ends = [group[0].header for _, group in groups[1:]] + [directory]
        for (is_mapped, group), start, end in zip(groups, [0, *ends], ends, strict=False):
            if is_mapped:
                for member in group:
                    self._storages[member.name] = mapped.storage[member.start : member.end]
                self._buffers.append((0, mapped.memory, group))
                self._add_pages(start, end)
            else:
                self._add_buffer(start, end, group)
        self._add_buffer(directory, self._archive.size)

    def state(self, *, weights_only: bool, map_location: Any) -> Any:
        """See `Layout.state`. The bytes may lie in another way than the directory made expect."""
        directory = self._buffers[-1][1][-len(self._archive.directory) :]
        headers = ((one, buffer, one.header - start) for start, buffer, members in self._buffers for one in members)
        if directory != self._archive.directory or not all(itertools.starmap(agrees, headers)):
            raise OtherLayoutError
        self._buffers.clear()  # Each is freed when its last member is taken.
        if not weights_only and os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD"):  # torch.load knows what it means.
            raise OtherLayoutError
        reader = _Reader(self._archive.members, self._small, self.take)
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

    def __init__(
        self, members: Sequence[Member], small: Mapping[str, memoryview], take: Callable[[str, int], Any]
    ) -> None:
        self._members = {member.name: member for member in members}
        self._small = small
        self._take = take
        self._taken: list[tuple[str, Any, int]] = []
        """Name, weak reference and size of each storage that was handed out: one that moved to a device is freed."""

    def check_sizes(self) -> None:
        """Raise `CorruptError` if a tensor has needed more bytes than its storage has. torch makes it larger then."""
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
        storage = self._take(name, size)
        taken = storage if storage.nbytes() == size else storage[:size]
        self._taken.append((name, StorageWeakRef(taken), size))  # type: ignore[no-untyped-call]
        return _Taken(taken)


class _Taken:
    """Stands for the tensor that a reader of torch returns."""

    def __init__(self, storage: Any) -> None:
        self._untyped_storage = storage

    def _typed_storage(self) -> _Taken:
        return self


def _is_storage(member: Member) -> bool:
    return member.name.startswith(_DATA)
