"""Reads every record of a directory with one listing and one cache read; the cache is never believed over a record."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

import attrs
import xxhash

from checkpointer.commit.signing import HMACKey, check_signature
from checkpointer.errors import RecordError, SchemaError, UntrustedError
from checkpointer.ports import Stat, Storage
from checkpointer.records.codec import MAX_RECORD_BYTES
from checkpointer.records.codec import parse_json as parse_json
from checkpointer.records.names import MAX_PART_BYTES
from checkpointer.records.record import SCHEMA, Entry
from checkpointer.storage.digests import is_cryptographic
from checkpointer.storage.reader import read_whole

__all__ = [
    "HOME",
    "INDEX",
    "RECORDS",
    "Listing",
    "directories_below",
    "json_name",
    "load",
    "read_bounded",
    "read_entry",
    "record_path",
    "save",
]

HOME: Final = ".checkpointer"
"""Folder of everything that is not a payload or alias."""
RECORDS: Final = f"{HOME}/records"
INDEX: Final = f"{HOME}/index.json"
_JSON: Final = ".json"
MAX_INDEX_BYTES: Final = 1 << 30


def record_path(name: str) -> str:
    """Return where the record of the payload ``name`` lies."""
    return f"{RECORDS}/{json_name(name)}"


def json_name(name: str) -> str:
    """Return ``name`` with ``.json`` at its end; where that is too long for a file, with a digest in its middle."""
    folder, slash, last = name.rpartition("/")
    data = last.encode()
    if len(data) + len(_JSON) > MAX_PART_BYTES:
        digest = xxhash.xxh3_64_hexdigest(data)
        room = MAX_PART_BYTES - len(_JSON) - len(digest) - 1
        # A character that is cut in two is left out.
        last = f"{data[:room].decode(errors='ignore')}~{digest}"
    return f"{folder}{slash}{last}{_JSON}"


def directories_below(paths: Iterable[str], inside: str = HOME) -> list[str]:
    """Return the folders below a directory that hold files of their own ``inside``, sorted.

    Example:
        >>> directories_below(["a.ckpt", "b/c/.checkpointer/records/d.ckpt.json", "b/c/d.ckpt"])
        ['b/c']
    """
    there = f"/{inside}/"
    return sorted({path[: path.index(there)] for path in paths if there in path and not path.startswith(f"{HOME}/")})


@attrs.frozen(kw_only=True)
class Listing:
    """What a directory holds."""

    entries: dict[str, Entry]
    """Each readable record file by its path."""
    damaged: dict[str, RecordError]
    """Each record file that cannot be read or believed by its path, with what is wrong."""
    files: Mapping[str, Stat]
    """Every file of the directory."""
    reads: int = 0
    """How many record files had to be read, because the index did not know them."""

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes under each name that is not our own: the size of a file, the sum of a folder's."""
        sizes: dict[str, int] = {}
        for path, stat in self.files.items():
            if path.startswith(f"{HOME}/"):
                continue
            for name in (path, *(path[:i] for i, char in enumerate(path) if char == "/")):
                sizes[name] = sizes.get(name, 0) + stat.size
        return sizes

    @property
    def foreign(self) -> frozenset[str]:
        """Every name in use, folders included, that no record names."""
        known = {entry.record.name for entry in self.entries.values()}
        names: set[str] = set()
        for path in self.files:
            if path.startswith(f"{HOME}/") or path in known:
                continue
            folders = [path[:i] for i, char in enumerate(path) if char == "/"]
            if not known.intersection(folders):
                names.update(folders, [path])
        # What stands beside an unreadable record is somebody's checkpoint: its name stays taken. (That of a name too
        # long to be read off its path is among the files anyway.)
        names.update(path[len(RECORDS) + 1 : -len(_JSON)] for path in self.damaged)
        return frozenset(names)


def load(storage: Storage, trust: HMACKey | None = None) -> Listing:
    """Read all records, from the index where the listing shows that a record file is unchanged.

    With a key, whatever it has not signed is damaged, in the index as in the records.

    Raises:
        SchemaError: If a record was written by a newer version of this library.
    """
    files = storage.list()
    cached = _cached(storage, files)
    entries: dict[str, Entry] = {}
    damaged: dict[str, RecordError] = {}
    reads = 0
    for path, stat in files.items():
        if not path.startswith(f"{RECORDS}/") or not path.endswith(".json"):
            continue
        try:
            entry = None if _is_racy(stat, files) else _from_cache(cached, path, stat, trust)
            reads += entry is None
            entries[path] = entry or read_entry(storage, path, trust)
        except FileNotFoundError:
            continue  # Retired by a live manager since the listing.
        except SchemaError:
            raise
        except RecordError as error:
            damaged[path] = error
    return Listing(entries=entries, damaged=damaged, files=files, reads=reads)


def read_entry(storage: Storage, path: str, trust: HMACKey | None) -> Entry:
    """Read one record file; raises `RecordError` if it cannot be read, or the key has not signed it."""
    entry = _believed(parse_json(read_bounded(storage, path), path), path, trust)
    if record_path(entry.record.name) != path:
        msg = f"{path}: it is the record of {entry.record.name!r}; a record lies under its payload's name"
        raise RecordError(msg)
    return entry


def _believed(data: object, where: str, trust: HMACKey | None) -> Entry:
    # First whether the data is ours at all: what is not may say anything, such as that it has a later schema.
    check_signature(data, where, trust)
    entry = Entry.from_dict(data, where)
    for record in (entry.record, entry.previous):
        if trust is not None and record is not None and not is_cryptographic(record.digest):
            msg = f"{where}: its digest {record.digest} can be forged; under trust= only sha256 is believed"
            raise UntrustedError(msg)
    return entry


def read_bounded(storage: Storage, path: str, limit: int = MAX_RECORD_BYTES) -> bytes:
    """Read a small file, or as much of a large one as shows that it is too large."""
    return read_whole(lambda: storage.open(path), limit + 1)


def _cached(storage: Storage, files: Mapping[str, Stat]) -> dict[str, Any]:
    if INDEX not in files:
        return {}
    try:
        limit = _index_limit(files)
        data = parse_json(read_bounded(storage, INDEX, limit), INDEX, limit)
        return data["entries"] if data["schema"] == SCHEMA and isinstance(data["entries"], dict) else {}
    except (OSError, RecordError, KeyError, TypeError):
        return {}


def _is_racy(stat: Stat, files: Mapping[str, Stat]) -> bool:
    """Return whether a record may have been rewritten since the index was, without a sign of it in its version."""
    written = files[INDEX].modified_s if INDEX in files else None
    return stat.modified_s is not None and (written is None or stat.modified_s >= written)


def _index_limit(files: Mapping[str, Stat]) -> int:
    """Return the most bytes that an index of these records has: of a larger one not even the reading is worth it."""
    records = [(path, stat.size) for path, stat in files.items() if path.startswith(f"{RECORDS}/")]
    # Text that is not ASCII takes up to three times as much in the index as in a record.
    return min(MAX_INDEX_BYTES, 1024 + sum(256 + 6 * len(path) + 4 * size for path, size in records))


def _from_cache(cached: Mapping[str, Any], path: str, stat: Stat, trust: HMACKey | None) -> Entry | None:
    match cached.get(path):
        case [size, version, data] if size == stat.size and version == stat.version != "":
            try:
                entry = _believed(data, f"{INDEX}, in {path!r}", trust)
            except RecordError:
                return None
            return entry if record_path(entry.record.name) == path else None
        case _:
            return None


def save(storage: Storage, listing: Listing) -> None:
    """Write the cache of these records, but for those that may change without a sign of it in their version."""
    times = [
        s.modified_s for path, s in listing.files.items() if path.startswith(f"{HOME}/") and s.modified_s is not None
    ]
    newest = max(times, default=0.0)
    entries = {
        path: [stat.size, stat.version, entry.to_dict()]
        for path, entry in listing.entries.items()
        if entry.status == "committed"
        and (stat := listing.files.get(path)) is not None
        # Written in the very second of the listing: again, by another writer, before the index is.
        and (stat.modified_s is None or stat.modified_s < newest)
    }
    storage.write(INDEX, json.dumps({"schema": SCHEMA, "entries": entries}, separators=(",", ":")).encode())
