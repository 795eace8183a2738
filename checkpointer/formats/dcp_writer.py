"""Writes DCP folders: each process takes the digests of its shards as it writes them.

A folder's record has the digest of each file, and of the files' digests together. DCP's metadata, which is one of these
files, has the digest of each *item*: a shard of a tensor, or a value, which is a range of bytes of a file. So a process
that has read the metadata and compared it with the record can verify an item alone, from whichever file it is.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping
from typing import Any, Final, cast

from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.futures import Future

from checkpointer._write_back import WRITE_BACK, begin_write_back
from checkpointer.errors import SaveError
from checkpointer.formats.dcp_reader import Portable
from checkpointer.formats.inspection.dcp_metadata import ITEM_DIGEST
from checkpointer.records.codec import METADATA
from checkpointer.records.digest_algorithms import DIGESTS

_CHUNK: Final = 1 << 20
"""Bytes that are digested and written at a time: they stay in the processor's cache."""


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
        self.items: dict[tuple[str, int, int], str] = {}
        """Digest of each range of bytes: by the file's name, the offset and the end."""

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


class _FolderWriter(Portable):
    """A writer of DCP that digests what it writes. DCP itself sends the digests to rank 0, with the results.

    The first rank makes the folder. It can be moved, because its staging path is not recorded. This class comes before
    the writer among the base classes.
    """

    fs: Any
    path: Any
    save_id: str
    sync_files: bool
    files: Mapping[str, tuple[int, str]]
    """After the save, on the first rank: size (bytes) and digest (hex digits) of each file of all ranks."""
    _makes_folder = True

    def digest_by(self, algorithm: str) -> None:
        """Digest what is written from now on."""
        files = DigestingFiles if self.sync_files else DirectFiles
        self.fs = files(self.fs, algorithm, are_local=self.sync_files)
        self.files = {}

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._makes_folder = is_coordinator
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)  # type: ignore[misc]

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return cast(SavePlan, super().prepare_local_plan(plan)) if self._makes_folder else plan  # type: ignore[misc]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[Any]:
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


class Writer(_FolderWriter, FileSystemWriter):
    """Writes to a path, which all ranks have to see."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        """See ``StorageWriter.write_data``. Raise `SaveError` if this rank does not see the folder."""
        if not os.path.isdir(self.path):
            msg = (
                f"this rank ({socket.gethostname()}) does not see {os.fspath(self.path)}, which the first rank has "
                "made; all ranks have to use one directory, on a disk that they share"
            )
            raise SaveError(msg)
        return super().write_data(plan, planner)


class UrlWriter(_FolderWriter, FsspecWriter):
    """Writes to a URL: closing a file makes it durable there, and its stream has nothing that could be synced.

    DCP would sync every disk of this machine instead, and torch 2.14 warns of it.
    """

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, sync_files=url.startswith(("file://", "local://")), **options)
