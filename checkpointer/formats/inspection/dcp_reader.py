"""Reads DCP folders: a reader that runs nothing, and allocates nothing that a folder only claims."""

from __future__ import annotations

import contextlib
import io
import math
import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, BinaryIO, Final, cast

import torch
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from checkpointer.errors import CheckpointerError, CorruptError, NamingError, RestoreError, portable, reading
from checkpointer.formats.inspection.dcp_metadata import read_dcp_metadata
from checkpointer.formats.inspection.torch_file import check_sound
from checkpointer.ports import Storage
from checkpointer.records.codec import METADATA
from checkpointer.records.names import check_name

_STEPS: Final = {
    *("set_up_storage_writer", "set_up_planner", "create_local_plan", "prepare_local_plan", "write_data", "finish"),
    *("read_metadata", "read_data"),
}
"""Methods that DCP calls on a rank while the others wait."""


def expect_no_group() -> None:
    """Ignore torch's warning that there is no process group: ``no_dist`` says so.

    It stays ignored, because filters are not a thread's own.
    """
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


@contextlib.contextmanager
def _portably() -> Iterator[None]:
    """Raise what the other ranks can be sent: an error that cannot be pickled would leave them waiting within DCP."""
    try:
        yield
    except Exception as error:
        raise portable(error) from error


@contextlib.contextmanager
def as_they_are(kind: type[CheckpointerError]) -> Iterator[None]:
    """Raise what a rank has raised instead of DCP's bundle; an error of another kind becomes a ``kind``."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        if isinstance(cause, (CheckpointerError, OSError, MemoryError)):
            raise cause from None
        msg = f"rank {rank}: {type(cause).__name__}: {cause}"
        raise kind(msg) from cause


class Portable:
    """Raises in DCP's steps what the other ranks can be sent."""

    def __init_subclass__(cls) -> None:
        for step in _STEPS & set(dir(cls)):
            setattr(cls, step, _portably()(vars(cls).get(step) or _of_parent(cls, step)))


def _of_parent(cls: type, step: str) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(super(cls, self), step)(*args, **kwargs)

    return call


class _Safe:
    """A reader that runs nothing its folder's metadata might hold, and reads nothing outside of the folder."""

    weights_only = True
    metadata: Metadata | None = None
    """That of the folder, once it was read."""
    error: Exception | None = None
    """The error of the metadata: DCP passes on its text only."""
    is_planned = False
    """Whether the planner raises that error, within a step of DCP: then all ranks get it."""
    rank = 0
    fs: Any
    path: Any
    load_id: str

    def load_into(self, state: dict[str, Any], planner: DefaultLoadPlanner, **group: Any) -> None:
        """Read the folder into a state."""
        if self.weights_only:
            self.transforms = _Checking()
        self.rank = torch.distributed.get_rank(group["process_group"]) if "process_group" in group else 0
        try:
            with as_they_are(RestoreError):
                load(state, storage_reader=cast(FileSystemReader, self), planner=planner, **group)
        except RestoreError as error:
            raise (None if self.is_planned else self.error) or error from None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self.metadata is None:
            self.metadata = self._read_metadata()
        self.metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self.metadata

    def _read_metadata(self) -> Metadata:
        try:
            stream = io.BytesIO(self.metadata_bytes())
            return _read_metadata(stream, os.fspath(self.path), weights_only=self.weights_only)
        except (RestoreError, OSError) as error:
            self.error = error
            if not self.is_planned:
                raise
            return Metadata({})

    def metadata_bytes(self) -> bytes:
        """Return the bytes of the folder's metadata."""
        try:
            with self.fs.create_stream(self.fs.concat_path(self.path, METADATA), "rb") as stream:
                return bytes(stream.read())
        except FileNotFoundError as error:
            msg = f"{self.path} has no {METADATA}, so torch.distributed.checkpoint did not write this folder"
            raise CorruptError(msg) from error

    def _slice_file(self, file: BinaryIO, info: Any) -> Any:
        return _Slice(file, info.offset, info.length)

    def held(self) -> int:
        """Return how many bytes of tensors the folder can hold at most."""
        if isinstance(self.fs, FileSystem):
            names = {info.relative_path for info in self.read_metadata().storage_data.values()}
            paths = [os.path.join(self.path, name) for name in names]
            return sum(os.path.getsize(path) for path in paths if os.path.isfile(path))
        return int(self.fs.fs.du(self.path))


class _Slice(io.RawIOBase):
    """Some bytes of a file. That of torch cannot seek from its end."""

    def __init__(self, stream: BinaryIO, start: int, length: int) -> None:
        self._stream = stream
        self._start = start
        self._length = length
        stream.seek(start)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._stream.tell() - self._start

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self._length}[whence]
        return self._stream.seek(self._start + max(base + offset, 0)) - self._start

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(min(len(buffer), max(self._length - self.tell(), 0)))
        buffer[: len(data)] = data
        return len(data)


class _Checking:
    """Looks at the bytes of each tensor before torch loads them."""

    def transform_load_stream(self, item: ReadItem, transforms: Sequence[str], stream: BinaryIO) -> BinaryIO:
        """Return the stream; raise `CorruptError` if it claims more than it holds, or is compressed."""
        if transforms:
            msg = f"{item.storage_index.fqn} was written through {transforms}, which a safe load does not undo"
            raise CorruptError(msg)
        if item.type != LoadItemType.BYTE_IO:  # Else `_Planner.load_bytes` looks at it.
            with reading(item.storage_index.fqn):
                check_sound(stream)
        return stream


class StoredFiles:
    """A folder of a storage, as a filesystem of DCP that is only read."""

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage = storage
        self._prefix = f"{name}/" if name else ""
        self.sizes = {path.removeprefix(self._prefix): stat.size for path, stat in storage.list(name).items()}
        """Bytes of each file."""

    def concat_path(self, path: object, suffix: str) -> str:
        """See ``FileSystemBase.concat_path``."""
        return self._prefix + suffix

    def create_stream(self, path: str, mode: str) -> AbstractContextManager[BinaryIO]:
        """See ``FileSystemBase.create_stream``."""
        return self._storage.open(path)


class Reader(Portable, _Safe, FileSystemReader):  # type: ignore[misc]
    """Reads a path."""


class UrlReader(Portable, _Safe, FsspecReader):  # type: ignore[misc]
    """Reads a URL."""


def _read_metadata(stream: BinaryIO, folder: str, *, weights_only: bool) -> Metadata:
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
