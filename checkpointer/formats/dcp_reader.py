"""Reads DCP folders: a reader that runs nothing, allocates nothing that is only claimed, and verifies what it reads."""

from __future__ import annotations

import contextlib
import io
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any, BinaryIO, Final, cast

import attrs
import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint._nested_dict import set_element  # type: ignore[attr-defined]
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.futures import Future

from checkpointer._display import shard_text, some_of
from checkpointer.errors import CheckpointerError, CorruptError, RestoreError, portable
from checkpointer.formats.archive_reader import OtherLayoutError
from checkpointer.formats.inspection.dcp_folder import Slice
from checkpointer.formats.inspection.dcp_metadata import ITEM_DIGEST, folder_metadata
from checkpointer.formats.torch_file import TorchFormat
from checkpointer.formats.torch_one_pass import TorchLayout
from checkpointer.records.codec import METADATA
from checkpointer.records.digest_algorithms import DIGESTS

_CHUNK: Final = 1 << 20
"""Bytes that are read and digested at a time: they stay in the processor's cache."""
_ALIKE: Final = "all ranks have to see the same directory"
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


@attrs.frozen(kw_only=True)
class Check:
    """How a reader verifies what it reads."""

    files: Mapping[str, tuple[int, str]]
    """Size (bytes) and digest (hex digits) of each file, from the record."""
    algorithm: str
    everything: bool
    """Verify each byte of the folder on some rank, or only what a rank reads."""

    def new(self) -> Any:
        """Return a new hash."""
        return DIGESTS[self.algorithm]()

    def is_other(self, name: str, data: bytes) -> bool:
        """Return whether a file has other bytes than were written."""
        return self.files.get(name) != (len(data), DIGESTS[self.algorithm](data).hexdigest())


def share_out(plans: Iterable[LoadPlan], storage_data: Mapping[Any, Any]) -> list[LoadPlan]:
    """Return the plans of all ranks, each with a share of the items that no rank reads."""
    plans = [*plans]
    read = [{item.storage_index for item in plan.items} for plan in plans]
    sizes = [sum(storage_data[index].length for index in indices) for indices in read]
    left = storage_data.keys() - set().union(*read)
    for plan in plans:
        plan.storage_data = []
    for index in sorted(left, key=lambda index: (-storage_data[index].length, str(index))):
        rank = sizes.index(min(sizes))
        plans[rank].storage_data.append(index)
        sizes[rank] += storage_data[index].length
    return plans


class FolderReader(Portable):
    """A reader of DCP that compares each item with its digest as it reads it. Each item is read once.

    It runs nothing that its folder might hold, and reads nothing outside of the folder. It comes before the reader
    among the base classes.
    """

    weights_only = True
    check: Check | None = None
    """None verifies nothing."""
    is_near = True
    """Whether a part of a file can be read twice at little cost."""
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
    storage_data: Mapping[Any, Any]
    _taken: Mapping[str, Mapping[tuple[int, int], str]] = MappingProxyType({})
    """By file: the digest of each item that the metadata has none of."""

    def load_into(self, state: dict[str, Any], planner: DefaultLoadPlanner, **group: Any) -> None:
        """Read the folder into a state."""
        self.rank = torch.distributed.get_rank(group["process_group"]) if "process_group" in group else 0
        try:
            with as_they_are(RestoreError):
                load(state, storage_reader=cast(FileSystemReader, self), planner=planner, **group)
        except RestoreError as error:
            raise (None if self.is_planned else self.error) or error from None

    # The metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """See ``StorageReader.read_metadata``."""
        if self.metadata is None:
            self.metadata = self._read_metadata()
        self.metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self.metadata

    def _read_metadata(self) -> Metadata:
        try:
            stream = io.BytesIO(self._metadata_bytes())
            return folder_metadata(stream, os.fspath(self.path), weights_only=self.weights_only)
        except (RestoreError, OSError) as error:
            self.error = error
            if not self.is_planned:
                raise
            return Metadata({})

    def _metadata_bytes(self) -> bytes:
        with self._opened(METADATA) as stream:
            data = bytes(stream.read())
        if self.check is not None and self.check.is_other(METADATA, data):
            msg = f"its file {METADATA} has other bytes than were written"
            if not self.rank:
                raise CorruptError(msg)
            msg = f"rank {self.rank}: {msg}, and rank 0 reads the right ones; {_ALIKE}"
            raise RestoreError(msg)
        return data

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        with self._finding(name) as path, self.fs.create_stream(path, "rb") as stream:
            yield stream

    @contextlib.contextmanager
    def _finding(self, name: str) -> Iterator[Any]:
        """Yield the path of a file in the folder. If the file is missing, say on which rank."""
        path = self.fs.concat_path(self.path, name)
        try:
            yield path
        except FileNotFoundError as error:
            if self.rank:  # Rank 0 has found all of them.
                msg = f"rank {self.rank} does not find {os.fspath(path)}, which rank 0 sees; {_ALIKE}"
                raise RestoreError(msg) from error
            what = "so torch.distributed.checkpoint did not write this folder" if name == METADATA else "it is gone"
            msg = f"{os.fspath(self.path)} has no {shard_text(name)}, {what}"
            raise CorruptError(msg) from error

    # What the folder holds, before its tensors are read

    @cached_property
    def tensors(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """The shape and the dtype of each tensor, by name."""
        stored = self.read_metadata().state_dict_metadata.items()
        return {
            name: (tuple(one.size), one.properties.dtype)
            for name, one in stored
            if isinstance(one, TensorStorageMetadata)
        }

    def has_value(self, name: str) -> bool:
        """Return whether the folder holds a value of this name that is not a tensor."""
        return MetadataIndex(name) in self.read_metadata().storage_data

    def value(self, name: str) -> Any:
        """Return one value that is not a tensor, by name, without communication."""
        content = io.BytesIO(self._bytes_of_item(self.read_metadata().storage_data[MetadataIndex(name)]))
        return TorchFormat().read(content, weights_only=self.weights_only, map_location="cpu")

    def whole(self) -> dict[str, Any]:
        """Return a template of whole tensors for all that the folder holds."""
        metadata, tensors = self.read_metadata(), self.tensors
        claimed = sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors.values())
        held = self._held()
        if claimed > held:
            msg = f"its metadata names tensors of {claimed} bytes, and its files have {held}"
            raise CorruptError(msg)
        state: dict[str, Any] = {}
        for name in metadata.state_dict_metadata:
            value = torch.empty(tensors[name][0], dtype=tensors[name][1]) if name in tensors else None
            set_element(state, (metadata.planner_data or {}).get(name, (name,)), value)
        return state

    def _held(self) -> int:
        """Return how many bytes of tensors the folder can hold at most."""
        if isinstance(self.fs, FileSystem):
            names = {info.relative_path for info in self.read_metadata().storage_data.values()}
            paths = [os.path.join(self.path, name) for name in names]
            return sum(os.path.getsize(path) for path in paths if os.path.isfile(path))
        return int(self.fs.fs.du(self.path))

    # The items

    def _bytes_of_item(self, info: Any) -> bytes:
        """Return the bytes of one value that is not a tensor, compared with its digest if the reader verifies."""
        with self._opened(info.relative_path) as stream:
            try:
                return bytes(self._part(stream, info).whole())
            except _OtherBytesError:
                msg = f"a value in its file {shard_text(info.relative_path)} has other bytes than were written"
                raise CorruptError(msg) from None

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """See ``StorageReader.prepare_global_plan``. On the first rank."""
        plans = super().prepare_global_plan(plans)  # type: ignore[misc]
        return share_out(plans, self.storage_data) if self.check is not None and self.check.everything else plans

    def read_data(self, plan: LoadPlan, planner: Any) -> Future[None]:
        """See ``StorageReader.read_data``."""
        done: Future[None] = Future()
        if self.check is None and not self.weights_only:  # It may have been written through transforms.
            with self._finding("file"):
                done = super().read_data(plan, planner)  # type: ignore[misc]
            return done
        wanted: dict[Any, list[ReadItem]] = {index: [] for index in plan.storage_data or ()}
        for item in plan.items:
            wanted.setdefault(item.storage_index, []).append(item)
        files: dict[str, list[Any]] = {}
        for index in sorted(wanted, key=lambda index: self.storage_data[index].offset):
            files.setdefault(self.storage_data[index].relative_path, []).append(index)
        problems = [self._read_file(name, {i: wanted[i] for i in indices}, planner) for name, indices in files.items()]
        if any(problems):
            raise CorruptError("; ".join(filter(None, problems)))
        done.set_result(None)
        return done

    def _read_file(self, name: str, wanted: Mapping[Any, Sequence[ReadItem]], planner: Any) -> str:
        """Read these items of a file; return what is wrong with them."""
        bad: list[str] = []
        with self._opened(name) as stream:
            for index, items in wanted.items():
                try:
                    self._read_item(stream, index, items, planner)
                except _OtherBytesError:
                    bad.append(index.fqn)
                except CorruptError as error:
                    msg = f"{index.fqn}: {error}"
                    raise CorruptError(msg) from error
        if len(bad) > 1 and len(bad) == len(wanted):
            return f"its file {shard_text(name)} is not the one that was written: all that was read of it differs"
        return f"{some_of(bad)} in its file {shard_text(name)} has other bytes than were written" if bad else ""

    def _read_item(self, stream: Any, index: Any, items: Sequence[ReadItem], planner: Any) -> None:
        info = self.storage_data[index]
        part = self._part(stream, info)
        if not items:
            part.skim()
        elif info.transform_descriptors:
            msg = f"it was written through {info.transform_descriptors}, which a safe load does not undo"
            raise CorruptError(msg)
        elif items[0].type == LoadItemType.BYTE_IO:
            data = part.whole()
            for item in items:
                planner.load_bytes(item, io.BytesIO(data))
        else:
            # Without a check the bytes may be read from anywhere straight into their final memory.
            tensor = part.tensor(is_near=self.is_near or self.check is None)
            for item in items:
                _copy_into(planner, item, tensor)

    def _part(self, stream: Any, info: Any) -> _Part:
        """Return an item with its digest.

        Another version of torch may write without digests of items. Then the file is compared as a whole, once, and the
        same read takes the digests of its items.
        """
        if info.offset + info.length > stream.seek(0, os.SEEK_END):  # Nothing is allocated for what is only claimed.
            raise _OtherBytesError
        if self.check is None:
            return _Part(stream, info, _Unchecked, "")
        digest = getattr(info, ITEM_DIGEST, None)
        if digest is None:
            name = info.relative_path
            if name not in self._taken:
                self._taken = {**self._taken, name: self._take(stream, name, self.check)}
            digest = self._taken[name][info.offset, info.offset + info.length]
        return _Part(stream, info, self.check.new, digest)

    def _take(self, stream: Any, name: str, check: Check) -> Mapping[tuple[int, int], str]:
        infos = [info for info in self.read_metadata().storage_data.values() if info.relative_path == name]
        whole, taken, position = check.new(), dict[tuple[int, int], str](), 0
        end = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        for begin, stop in [*sorted({(info.offset, info.offset + info.length) for info in infos}), (end, end)]:
            if not position <= begin <= stop <= end:
                raise _OtherBytesError
            _digested(stream, begin - position, whole)
            item = check.new()
            _digested(stream, stop - begin, whole, item)
            taken[begin, stop], position = item.hexdigest(), stop
        if (end, whole.hexdigest()) != check.files.get(name):
            raise _OtherBytesError
        return taken


class Reader(FolderReader, FileSystemReader):  # type: ignore[misc]
    """Reads a path."""


class UrlReader(FolderReader, FsspecReader):  # type: ignore[misc]
    """Reads a URL."""

    is_near = False


class _OtherBytesError(Exception):
    """Raised if an item has other bytes than its digest says."""


class _Unchecked:
    """Stands for a hash where nothing is verified."""

    def update(self, data: object) -> None:
        pass

    def hexdigest(self) -> str:
        return ""


def _digested(stream: Any, size: int, *hashes: Any) -> None:
    """Add so many bytes of a stream to some hashes."""
    while size:
        chunk = stream.read(min(size, _CHUNK))
        if not chunk:
            raise _OtherBytesError
        for one in hashes:
            one.update(chunk)
        size -= len(chunk)


def _copy_into(planner: Any, item: ReadItem, tensor: torch.Tensor) -> None:
    """Do what DCP's own reader does with a tensor that it has loaded."""
    source = narrow_tensor_by_index(tensor, item.storage_offsets, item.lengths)
    target = planner.resolve_tensor(item).detach()
    if target.size() != source.size():
        msg = f"{item.dest_index.fqn}: a shard of {list(source.size())} does not fit {list(target.size())}"
        raise CorruptError(msg)
    target.copy_(source)
    planner.commit_tensor(item, target)


class _Part:
    """An item in an open file: what ``torch.save`` has written for a tensor or a value."""

    def __init__(self, stream: Any, info: Any, new: Callable[[], Any], digest: str) -> None:
        self._stream = stream
        self._offset: int = info.offset
        self._length: int = info.length
        self._new = new
        self._digest = digest

    def skim(self) -> None:
        """Compare the bytes with their digest."""
        digest = self._new()
        self._stream.seek(self._offset)
        _digested(self._stream, self._length, digest)
        self._compare(digest)

    def whole(self) -> bytearray:
        """Return the verified bytes."""
        data = bytearray(self._length)
        self._fill([memoryview(data)])
        return data

    def tensor(self, *, is_near: bool) -> torch.Tensor:
        """Return the verified tensor. If the file is near, its bytes go into their final memory."""
        item = Slice(self._stream, self._offset, self._length)
        layout = TorchLayout.of(cast(BinaryIO, item), is_mapped=False) if is_near else None
        if layout is not None:
            self._fill(view for _, view in layout.pieces)
            with contextlib.suppress(OtherLayoutError):
                return cast(torch.Tensor, layout.state(weights_only=True, map_location="cpu"))
        stream: Any = io.BytesIO(self.whole())
        return cast(torch.Tensor, TorchFormat().read(stream, weights_only=True, map_location="cpu"))

    def _fill(self, views: Iterable[memoryview]) -> None:
        """Fill buffers with all bytes, and compare these with their digest."""
        digest = self._new()
        self._stream.seek(self._offset)
        for view in views:
            while view:
                count = self._stream.readinto(view[:_CHUNK])
                if not count:
                    raise _OtherBytesError
                digest.update(view[:count])
                view = view[count:]
        self._compare(digest)

    def _compare(self, digest: Any) -> None:
        if self._digest != digest.hexdigest():
            raise _OtherBytesError
