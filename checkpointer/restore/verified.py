"""Opens the payload of a record to look into it, through bytes that were compared with the record."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, cast

from checkpointer.formats.inspection.payload import open_contents
from checkpointer.formats.inspection.tensors import Tensors
from checkpointer.ports import Stat, Storage
from checkpointer.records.record import Record
from checkpointer.restore.load import check_size, compare
from checkpointer.storage.digests import Blocks, FolderDigest, VerifiedReader, algorithm_of


@contextlib.contextmanager
def open_verified(storage: Storage, record: Record) -> Iterator[Tensors]:
    """Verify a payload, and open it. What is read from it are the verified bytes, even if its files change in between.

    Raises:
        CorruptError: If the payload differs from its record, now or when a part of it is read again.
    """
    files = check_size(storage, record)
    with open_contents(_VerifiedPayload(storage, record, files), record.name) as contents:
        yield contents


class _VerifiedPayload:
    """The files of one payload, as a storage that is only read."""

    write: Any = None
    delete: Any = None
    upload: Any = None

    def __init__(self, storage: Storage, record: Record, files: Mapping[str, int]) -> None:
        self._storage = storage
        self._files = files
        self._blocks: dict[str, Blocks] = {}
        digest = FolderDigest(algorithm_of(record.digest))
        for name in sorted(files):
            if name != record.name:
                digest.begin(name[len(record.name) + 1 :], files[name])
            with storage.open(name) as stream:
                self._blocks[name] = Blocks(stream, digest)
        compare(storage, record, (digest.size, digest.digest), digest.files)

    def __str__(self) -> str:
        return str(self._storage)

    def list(self, prefix: str = "") -> dict[str, Stat]:
        """See `Storage.list`."""
        below = f"{prefix}/" if prefix else ""
        return {name: Stat(size, "") for name, size in self._files.items() if name == prefix or name.startswith(below)}

    def open(self, path: str) -> BinaryIO:
        """See `Storage.open`."""
        blocks = self._blocks.get(path)
        if blocks is None:
            raise FileNotFoundError(path)
        return cast(BinaryIO, io.BufferedReader(VerifiedReader(self._storage.open(path), blocks)))
