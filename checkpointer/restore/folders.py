"""Compares a folder with the files that its record names: which are gone, new, or not the ones that were written.

If a folder of shards has other bytes, it names the tensors, by the digests in DCP's metadata.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, Final

from checkpointer._display import shard_text, some_of
from checkpointer.errors import CheckpointerError
from checkpointer.ports import Storage
from checkpointer.records.codec import METADATA
from checkpointer.records.digest_algorithms import DIGESTS
from checkpointer.records.record import Record
from checkpointer.storage.digests import algorithm_of_files, digest_of_files

_CHUNK: Final = 4 << 20


def difference(record: Record, files: Mapping[str, int]) -> str:
    """Return what differs between a folder's files (their sizes in bytes by path) and its record; empty if nothing."""
    if not record.files:
        return ""
    is_whole = digest_of_files(record.files, algorithm_of_files(record.digest)) == (record.size, record.digest)
    if not is_whole and set(record.files) != {METADATA}:
        return f"the files that the record of {record.name} names do not have its digest"
    there = {path[len(record.name) + 1 :]: size for path, size in files.items()}
    if gone := sorted(record.files.keys() - there.keys()):
        return f"{record.name} lacks {some_of([*map(shard_text, gone)])}"
    if is_whole and (new := sorted(there.keys() - record.files.keys())):
        return f"{record.name} has {some_of(new)}, which was not written with it"
    other = [inside for inside, (size, _) in sorted(record.files.items()) if size != there[inside]]
    sizes = [f"{shard_text(name)} with {there[name]} bytes instead of {record.files[name][0]}" for name in other]
    return f"{record.name} has {some_of(sizes)}" if other else ""


def other_files(storage: Storage, record: Record, found: Mapping[str, tuple[int, str]]) -> str:
    """Return which files have other digests than the record says, and which of their tensors, as a clause.

    It is empty if that cannot be known. The files that differ are read again.
    """
    other = [inside for inside, file in sorted(record.files.items()) if found.get(inside) != file]
    if not other:
        return ""
    tensors: Mapping[str, Sequence[str]] = {}
    with contextlib.suppress(OSError, CheckpointerError):  # The metadata may be gone by now.
        tensors = _other_items(storage, record, other)
    texts = [f"{some_of(tensors[one])} of {shard_text(one)}" if one in tensors else shard_text(one) for one in other]
    return f"other bytes are in {some_of(texts)}"


def _other_items(storage: Storage, record: Record, files: Sequence[str]) -> Mapping[str, Sequence[str]]:
    """Return for each file the tensors and values whose bytes have another digest than DCP's metadata says."""
    from checkpointer.formats.inspection.dcp_metadata import ITEM_DIGEST, read_dcp_metadata

    if METADATA not in record.files or METADATA in files:
        return {}
    with storage.open(f"{record.name}/{METADATA}") as stream:
        stored = read_dcp_metadata(stream).storage_data or {}
    found: dict[str, list[str]] = {}
    for inside in files:
        items = [(index.fqn, info) for index, info in stored.items() if info.relative_path == inside]
        if sum(info.length for _, info in items) > record.files[inside][0]:
            continue  # The items of a folder that DCP has written do not overlap.
        with storage.open(f"{record.name}/{inside}") as stream:
            for name, info in sorted(items, key=lambda item: item[1].offset):
                digest = DIGESTS[algorithm_of_files(record.digest)]()
                _read_into(digest, stream, info.offset, info.length)
                if getattr(info, ITEM_DIGEST, None) not in (None, digest.hexdigest()):
                    found.setdefault(inside, []).append(name)
    return found


def _read_into(digest: Any, stream: BinaryIO, offset: int, length: int) -> None:
    """Digest a range of bytes of a file."""
    stream.seek(offset)
    while length and (chunk := stream.read(min(length, _CHUNK))):
        digest.update(chunk)
        length -= len(chunk)
