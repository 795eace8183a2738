"""The digests of a DCP folder: each process takes those of its shards as it writes them, and compares what it reads.

A folder's record has the digest of each file, and of the files' digests together. DCP's metadata, which is one of these
files, has the digest of each *item*: a shard of a tensor, or a value, which is a range of bytes of a file. So a process
that has read the metadata and compared it with the record can verify an item alone, from whichever file it is.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, BinaryIO, Final, cast

import attrs
import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.futures import Future

from checkpointer._display import shard_text, some_of
from checkpointer._write_back import WRITE_BACK, begin_write_back
from checkpointer.errors import CorruptError, RestoreError
from checkpointer.formats.archive_reader import OtherLayoutError
from checkpointer.formats.inspection.dcp_metadata import ITEM_DIGEST
from checkpointer.formats.torch_file import TorchFormat
from checkpointer.formats.torch_one_pass import TorchLayout
from checkpointer.records.codec import METADATA
from checkpointer.records.digest_algorithms import DIGESTS

_CHUNK: Final = 1 << 20
"""Bytes that are digested and written at a time: they stay in the processor's cache."""
_ALIKE: Final = "all ranks have to see the same directory"

Item = tuple[str, int, int]
"""A range of bytes: the file's name, the offset and the end."""


class _DigestingStream:
    """Writes to another stream, and digests the file and each of its items.

    DCP asks for the position before and after each item, and at no other time.
    """

    def __init__(self, stream: Any, algorithm: str, *, is_file: bool) -> None:
        self._stream = stream
        self._is_file = is_file
        self._written_back = 0
        self._new = DIGESTS[algorithm]
        self.file, self._item = self._new(), self._new()
        self.size = self._begun = 0
        self.items: dict[tuple[int, int], str] = {}

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _CHUNK):
            chunk = view[start : start + _CHUNK]
            self.file.update(chunk)
            self._item.update(chunk)
            self._stream.write(chunk)
        self.size += len(view)
        if self._is_file and self.size - self._written_back >= WRITE_BACK:
            begin_write_back(self._stream.fileno(), self._written_back, self.size - self._written_back)
            self._written_back = self.size
        return len(view)

    def tell(self) -> int:
        if self.size > self._begun:
            self.items[self._begun, self.size] = self._item.hexdigest()
            self._begun, self._item = self.size, self._new()
        return self.size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class DigestingFiles:
    """A filesystem of DCP, whose new files are digested while they are written."""

    def __init__(self, files: Any, algorithm: str, *, are_local: bool) -> None:
        self._files = files
        self._are_local = are_local
        self._algorithm = algorithm
        self.written: dict[str, tuple[int, str]] = {}
        """Size (bytes) and digest (hex digits) of each file that this process has written."""
        self.items: dict[Item, str] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        """See ``FileSystemBase.create_stream``."""
        with self._files.create_stream(path, mode) as stream:
            if mode != "wb":
                yield stream
                return
            digesting = _DigestingStream(stream, self._algorithm, is_file=self._are_local)
            yield digesting
        name = _name(path)
        self.written[name] = digesting.size, digesting.file.hexdigest()
        self.items |= {(name, *part): digest for part, digest in digesting.items.items()}

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """See ``FileSystemBase.rename``."""
        self._files.rename(path, new_path)
        self.written[_name(new_path)] = self.written.pop(_name(path))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)


class DirectFiles(DigestingFiles):
    """The files of a new folder at a URL. DCP's metadata is written under its own name, so that it is not copied.

    The folder's record makes it count, and not the rename.
    """

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str | os.PathLike[str]:
        """See ``FileSystemBase.concat_path``."""
        joined: str | os.PathLike[str] = self._files.concat_path(path, suffix.removesuffix(".tmp"))
        return joined

    def exists(self, path: str | os.PathLike[str]) -> bool:
        """See ``FileSystemBase.exists``."""
        return False

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """See ``FileSystemBase.rename``: it has this name already."""


def _name(path: str | os.PathLike[str]) -> str:
    return os.fspath(path).rpartition("/")[2]


class DigestingWriter:
    """A writer of DCP that digests what it writes. DCP itself sends the digests to rank 0, with the results.

    It comes before the writer among the base classes.
    """

    fs: Any
    path: Any
    sync_files: bool
    files: Mapping[str, tuple[int, str]]
    """After the save, on the first rank: size (bytes) and digest (hex digits) of each file of all ranks."""

    def digest_by(self, algorithm: str) -> None:
        """Digest what is written from now on."""
        files = DigestingFiles if self.sync_files else DirectFiles
        self.fs = files(self.fs, algorithm, are_local=self.sync_files)
        self.files = {}

    def write_data(self, plan: Any, planner: Any) -> Future[Any]:
        """Write this rank's shards, and add the digest of each item to the metadata."""
        results = super().write_data(plan, planner).wait()  # type: ignore[misc]
        for result in results:
            info = result.storage_data
            digest = self.fs.items.get((info.relative_path, info.offset, info.offset + info.length))
            if digest is not None:
                setattr(info, ITEM_DIGEST, digest)
        written: Future[Any] = Future()
        written.set_result((results, self.fs.written))
        return written

    def finish(self, metadata: Any, results: Any) -> None:
        """Write the metadata. On the first rank."""
        super().finish(metadata, [written for written, _ in results])  # type: ignore[misc]
        everywhere: dict[str, tuple[int, str]] = {}
        for _, files in results:
            everywhere |= files
        self.files = {**everywhere, METADATA: self.fs.written[METADATA]}
        # DCP sends this object to all ranks, which do not need it: it names each shard of each rank.
        metadata.state_dict_metadata, metadata.planner_data, metadata.storage_data = {}, None, None


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


class VerifyingReader:
    """A reader of DCP that compares each item with its digest as it reads it. Each item is read once.

    It comes before the reader among the base classes.
    """

    fs: Any
    path: Any
    storage_data: Mapping[Any, Any]
    check: Check | None = None
    """None verifies nothing."""
    rank = 0
    is_near = True
    """Whether a part of a file can be read twice at little cost."""
    metadata: Any
    _taken: Mapping[str, Mapping[tuple[int, int], str]] = MappingProxyType({})
    """By file: the digest of each item that the metadata has none of."""

    def metadata_bytes(self) -> bytes:
        """Return the verified bytes of the folder's metadata."""
        with self.finding(METADATA) as path, self.fs.create_stream(path, "rb") as stream:
            data = bytes(stream.read())
        if self.check is not None and self.check.is_other(METADATA, data):
            msg = f"its file {METADATA} has other bytes than were written"
            if not self.rank:
                raise CorruptError(msg)
            msg = f"rank {self.rank}: {msg}, and rank 0 reads the right ones; {_ALIKE}"
            raise RestoreError(msg)
        return data

    @contextlib.contextmanager
    def finding(self, name: str) -> Iterator[Any]:
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

    def bytes_of_item(self, info: Any) -> bytes:
        """Return the bytes of one value that is not a tensor, compared with its digest if the reader verifies."""
        with self.finding(info.relative_path) as path, self.fs.create_stream(path, "rb") as stream:
            length = max(0, min(info.length, stream.seek(0, os.SEEK_END) - info.offset))
            try:
                if self.check is not None and length < info.length:
                    raise _OtherBytesError
                stream.seek(info.offset)
                return bytes(stream.read(length) if self.check is None else self._part(stream, info).whole())
            except _OtherBytesError:
                msg = f"a value in its file {shard_text(info.relative_path)} has other bytes than were written"
                raise CorruptError(msg) from None

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """See ``StorageReader.prepare_global_plan``. On the first rank."""
        plans = super().prepare_global_plan(plans)  # type: ignore[misc]
        return share_out(plans, self.storage_data) if self.check is not None and self.check.everything else plans

    def _part(self, stream: Any, info: Any) -> _Part:
        """Return an item with its digest.

        Another version of torch may write without digests of items. Then the file is compared as a whole, once, and the
        same read takes the digests of its items.
        """
        assert self.check is not None, "only a check needs it"
        digest = getattr(info, ITEM_DIGEST, None)
        if digest is None:
            name = info.relative_path
            if name not in self._taken:
                self._taken = {**self._taken, name: self._take(stream, name)}
            digest = self._taken[name][info.offset, info.offset + info.length]
        return _Part(stream, info, self.check.algorithm, digest)

    def _take(self, stream: Any, name: str) -> Mapping[tuple[int, int], str]:
        assert self.check is not None, "only a check needs it"
        infos = [info for info in self.metadata.storage_data.values() if info.relative_path == name]
        whole, taken, position = self.check.new(), dict[tuple[int, int], str](), 0
        end = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        for begin, stop in [*sorted({(info.offset, info.offset + info.length) for info in infos}), (end, end)]:
            if not position <= begin <= stop <= end:
                raise _OtherBytesError
            _digested(stream, begin - position, whole)
            item = self.check.new()
            _digested(stream, stop - begin, whole, item)
            taken[begin, stop], position = item.hexdigest(), stop
        if (end, whole.hexdigest()) != self.check.files.get(name):
            raise _OtherBytesError
        return taken

    def read_data(self, plan: LoadPlan, planner: Any) -> Future[None]:
        """See ``StorageReader.read_data``."""
        if self.check is None:
            with self.finding("file"):
                done: Future[None] = super().read_data(plan, planner)  # type: ignore[misc]
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
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read_file(self, name: str, wanted: Mapping[Any, Sequence[ReadItem]], planner: Any) -> str:
        """Read these items of a file; return what is wrong with them."""
        bad: list[str] = []
        with self.finding(name) as path, self.fs.create_stream(path, "rb") as stream:
            end = stream.seek(0, os.SEEK_END)
            for index, items in wanted.items():
                info = self.storage_data[index]
                if info.offset + info.length > end:  # Nothing is allocated for what is only claimed.
                    bad.append(index.fqn)
                    continue
                try:
                    self._read_item(stream, index, items, planner)
                except _OtherBytesError:
                    bad.append(index.fqn)
        if len(bad) > 1 and len(bad) == len(wanted):
            return f"its file {shard_text(name)} is not the one that was written: all that was read of it differs"
        return f"{some_of(bad)} in its file {shard_text(name)} has other bytes than were written" if bad else ""

    def _read_item(self, stream: Any, index: Any, items: Sequence[ReadItem], planner: Any) -> None:
        info = self.storage_data[index]
        part = self._part(stream, info)
        if not items:
            part.skim()
        elif items[0].type == LoadItemType.BYTE_IO:
            data = part.whole()
            for item in items:
                planner.load_bytes(item, io.BytesIO(data))
        else:
            tensor = part.tensor(is_near=self.is_near)
            for item in items:
                _copy_into(planner, item, tensor)


class _OtherBytesError(Exception):
    """Raised if an item has other bytes than its digest says."""


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

    def __init__(self, stream: Any, info: Any, algorithm: str, digest: str) -> None:
        self._stream = stream
        self._offset: int = info.offset
        self._length: int = info.length
        self._digest = digest
        self._new = DIGESTS[algorithm]
        self._hash = self._new()

    def skim(self) -> None:
        """Compare the bytes with their digest."""
        self._stream.seek(self._offset)
        buffer = memoryview(bytearray(min(_CHUNK, self._length)))
        for start in range(0, self._length, _CHUNK):
            self._fill(buffer[: self._length - start])
        self._compare()

    def whole(self) -> bytearray:
        """Return the verified bytes."""
        self._hash = self._new()
        self._stream.seek(self._offset)
        data = bytearray(self._length)
        self._fill(memoryview(data))
        self._compare()
        return data

    def tensor(self, *, is_near: bool) -> torch.Tensor:
        """Return the verified tensor. If the file is near, its bytes go into their final memory."""
        layout = TorchLayout.of(cast(BinaryIO, self), is_mapped=False) if is_near else None
        if layout is not None:
            self._stream.seek(self._offset)
            for _, view in layout.pieces:
                self._fill(view)
            self._compare()
            with contextlib.suppress(OtherLayoutError):
                return cast(torch.Tensor, layout.state(weights_only=True, map_location="cpu"))
        stream: Any = io.BytesIO(self.whole())
        return cast(torch.Tensor, TorchFormat().read(stream, weights_only=True, map_location="cpu"))

    def _fill(self, view: memoryview) -> None:
        while view:
            count = self._stream.readinto(view[:_CHUNK])
            if not count:
                raise _OtherBytesError
            self._hash.update(view[:count])
            view = view[count:]

    def _compare(self) -> None:
        if self._digest != self._hash.hexdigest():
            raise _OtherBytesError

    # What `TorchLayout.of` needs of a stream

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move within the item."""
        start = self._length if whence == os.SEEK_END else 0
        position: int = self._stream.seek(self._offset + start + offset)
        return position - self._offset

    def read(self, size: int) -> bytes:
        """Read on, unverified."""
        return bytes(self._stream.read(size))
