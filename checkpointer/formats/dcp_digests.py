"""The digests of a DCP folder: each process takes those of its shards as it writes them.

A folder's record has the digest of each file, and of the files' digests together. DCP's metadata, which is one of these
files, has the digest of each *item*: a shard of a tensor, or a value, which is a range of bytes of a file. So a process
that has read the metadata and compared it with the record can verify an item alone, from whichever file it is.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, Final

from torch.futures import Future

from checkpointer._write_back import WRITE_BACK, begin_write_back
from checkpointer.formats.inspection.dcp_metadata import ITEM_DIGEST
from checkpointer.records.codec import METADATA
from checkpointer.records.digest_algorithms import DIGESTS

_CHUNK: Final = 1 << 20
"""Bytes that are digested and written at a time: they stay in the processor's cache."""

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
