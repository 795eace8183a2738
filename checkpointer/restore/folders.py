"""Compares a folder with the files that its record names: which are gone, new, or not the ones that were written."""

from __future__ import annotations

from collections.abc import Mapping

from checkpointer._display import shard_text, some_of
from checkpointer.records.record import Record
from checkpointer.storage.digests import algorithm_of_files, digest_of_files


def difference(record: Record, files: Mapping[str, int]) -> str:
    """Return what differs between a folder's files (their sizes in bytes by path) and its record; empty if nothing."""
    if not record.files:
        return ""
    if digest_of_files(record.files, algorithm_of_files(record.digest)) != (record.size, record.digest):
        return f"the files that the record of {record.name} names do not have its digest"
    there = {path[len(record.name) + 1 :]: size for path, size in files.items()}
    if gone := sorted(record.files.keys() - there.keys()):
        return f"{record.name} lacks {some_of([*map(shard_text, gone)])}"
    if new := sorted(there.keys() - record.files.keys()):
        return f"{record.name} has {some_of(new)}, which was not written with it"
    other = [inside for inside, (size, _) in sorted(record.files.items()) if size != there[inside]]
    sizes = [f"{shard_text(name)} with {there[name]} bytes instead of {record.files[name][0]}" for name in other]
    return f"{record.name} has {some_of(sizes)}" if other else ""


def other_files(record: Record, found: Mapping[str, tuple[int, str]]) -> str:
    """Return which files have other digests than the record says, as a clause; empty if that cannot be known."""
    other = [shard_text(inside) for inside, file in sorted(record.files.items()) if found.get(inside) != file]
    return f"other bytes are in {some_of(other)}" if other else ""
