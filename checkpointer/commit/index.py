"""Reads every record of a directory with one listing and one cache read. A record overrides the cache."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, Final

import attrs
import xxhash

from checkpointer.commit.changes import Changes, changes_in, changes_path, read_changes
from checkpointer.commit.signing import UNCHECKED, HMACKey, check_signature
from checkpointer.commit.terms import Announced, read_limits
from checkpointer.errors import RecordError, SchemaError, UntrustedError
from checkpointer.ports import Stat, Storage
from checkpointer.records.codec import MAX_RECORD_BYTES
from checkpointer.records.codec import parse_json as parse_json
from checkpointer.records.manifest import Limits
from checkpointer.records.names import MAX_PART_BYTES
from checkpointer.records.record import SCHEMA, Entry
from checkpointer.storage.digests import is_cryptographic
from checkpointer.storage.reader import read_small

HOME: Final = ".checkpointer"
"""Folder of every file that is not a payload or alias."""
RECORDS: Final = f"{HOME}/records"
INDEX: Final = f"{HOME}/index.json"
_IN_RECORDS: Final = f"{RECORDS}/"
_JSON: Final = ".json"
MAX_INDEX_BYTES: Final = 1 << 30
_TRIES: Final = 5
"""If announced changes begin or end during so many listings in a row, the last one is taken."""


def record_path(name: str) -> str:
    """Return the path of the record of the payload ``name``."""
    return f"{RECORDS}/{json_name(name)}"


def json_name(name: str) -> str:
    """Return ``name`` with ``.json`` at its end. If that is too long for a file, a digest replaces its middle."""
    folder, slash, last = name.rpartition("/")
    data = last.encode()
    if len(data) + len(_JSON) > MAX_PART_BYTES:
        digest = xxhash.xxh3_64_hexdigest(data)
        room = MAX_PART_BYTES - len(_JSON) - len(digest) - 1
        # A character that would be cut in two is left out.
        last = f"{data[:room].decode(errors='ignore')}~{digest}"
    return f"{folder}{slash}{last}{_JSON}"


def directories_below(paths: Iterable[str], inside: str = HOME) -> list[str]:
    """Return the folders below a directory that have a folder ``inside`` with files, sorted.

    Example:
        >>> directories_below(["a.ckpt", "b/c/.checkpointer/records/d.ckpt.json", "b/c/d.ckpt"])
        ['b/c']
    """
    there = f"/{inside}/"
    return sorted({path[: path.index(there)] for path in paths if there in path and not path.startswith(f"{HOME}/")})


@attrs.frozen(kw_only=True)
class Listing:
    """The contents of a directory."""

    entries: dict[str, Entry]
    """Each readable record file by its path."""
    damaged: dict[str, RecordError]
    """Each record file that cannot be read or trusted by its path, with the error."""
    files: Mapping[str, Stat]
    """Every file of the directory."""
    changes: tuple[Changes, ...] = ()
    """What writers have announced to change, and may not have finished."""
    limits: Limits = attrs.field(factory=dict)
    """Which records count after another process took over a run: see `Manifest.limits`."""
    reads: int = 0
    """How many record files were read, because the index did not have them."""
    signed: int = 0
    """Number of records with a signature."""
    total: int = 0
    """Number of records that can be read, with a signature or without."""
    trust: HMACKey | None = None
    """The key; `UNCHECKED` if there are signed records, and no key was given."""

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file and folder outside `HOME`."""
        sizes: dict[str, int] = {}
        for path, stat in self.files.items():
            if path.startswith(f"{HOME}/"):
                continue
            for name in (path, *_folders(path)):
                sizes[name] = sizes.get(name, 0) + stat.size
        return sizes

    @cached_property
    def foreign(self) -> frozenset[str]:
        """The name of each file and folder that no record names."""
        known = {entry.record.name for entry in self.entries.values()}
        names: set[str] = set()
        for path in self.files:
            if path.startswith(f"{HOME}/") or path in known:
                continue
            folders = _folders(path)
            if known.isdisjoint(folders):
                names.update(folders, [path])
        # The payload beside a damaged record may be a checkpoint, so its name stays taken. (If the name is too long to
        # be read from the record's path, it is among the files anyway.)
        names.update(path[len(RECORDS) + 1 : -len(_JSON)] for path in self.damaged if path.startswith(f"{RECORDS}/"))
        return frozenset(names)


def _folders(path: str) -> list[str]:
    """Return each folder that a path lies in, the outermost first."""
    return list(itertools.accumulate(path.split("/")[:-1], "{}/{}".format))


def load(storage: Storage, trust: HMACKey | None = None, *, writers: Iterable[str] = ()) -> Listing:
    """Read all records. If the listing shows that a record file is unchanged, the index replaces it.

    With a key, a record or index entry without its signature counts as damaged. Without a key no signature is checked.
    But if one record is signed, each record without a signature is damaged: it may be planted. The changes of these
    ``writers`` are read even if the listing does not show them.

    Raises:
        SchemaError: If a record was written by a newer version of this library.
    """
    listing = _load(storage, trust, writers)
    signed = sum(bool(entry.signature) for entry in listing.entries.values())
    total = len(listing.entries)
    if signed and trust is None:
        trust = UNCHECKED
        listing = _load(storage, trust, writers)
    return attrs.evolve(listing, signed=signed, total=total, trust=trust)


def _load(storage: Storage, trust: HMACKey | None, writers: Iterable[str]) -> Listing:
    entries: dict[str, Entry] = {}
    refused: dict[str, RecordError] = {}
    reads = 0
    before: tuple[Changes, ...] = ()
    for tries_left in reversed(range(_TRIES)):
        files = storage.list()
        changes, damaged, finished = _read_changes(storage, files, trust, writers)
        # What is read later than it was listed may be newer: a checkpoint is removed, and the one instead of it is not
        # listed. So a listing counts if the same was announced before it and after it.
        if (finished or changes != before) and tries_left:
            before = changes
            continue
        entries, refused, reads, gone = _read_entries(storage, files, trust)
        # A live manager may have removed the one checkpoint that was listed, and committed the next one.
        if entries or not gone:
            break
    records = (entry.record for entry in entries.values())
    limits, announced, unknown = read_limits(storage, files, records, trust)
    return Listing(
        entries=entries,
        damaged=refused | damaged | unknown,
        files=files,
        changes=tuple(_without_late(one, announced) for one in changes),
        limits=limits,
        reads=reads,
    )


def _read_changes(
    storage: Storage, files: Mapping[str, Stat], trust: HMACKey | None, writers: Iterable[str]
) -> tuple[tuple[Changes, ...], dict[str, RecordError], bool]:
    """Return what writers have announced, what cannot be read, and whether a change was finished since the listing."""
    changes: list[Changes] = []
    damaged: dict[str, RecordError] = {}
    listed = changes_in(files)
    finished = False
    for path in dict.fromkeys((*listed, *map(changes_path, writers))):
        try:
            found = read_changes(storage, path, trust)
        except SchemaError:
            raise
        except RecordError as error:
            damaged[path] = error
        else:
            changes += [found] if found is not None else []
            finished |= found is None and path in listed
    return tuple(changes), damaged, finished


def _without_late(changes: Changes, announced: Announced) -> Changes:
    """Leave out what a writer has announced after another process had taken over: it finds that out, and stops."""

    def is_late(entry: Entry) -> bool:
        term, names = announced.get((entry.record.run, entry.record.label), (0, frozenset[str]()))
        return 0 < changes.term < term and entry.record.name not in names

    return attrs.evolve(changes, entries=tuple(entry for entry in changes.entries if not is_late(entry)))


def _read_entries(
    storage: Storage, files: Mapping[str, Stat], trust: HMACKey | None
) -> tuple[dict[str, Entry], dict[str, RecordError], int, bool]:
    """Return the entries, what cannot be read, how many were read, and whether one was removed since the listing."""
    cached = _cached(storage, files)
    written = files[INDEX].modified_s if INDEX in files else None
    gone = False
    entries: dict[str, Entry] = {}
    damaged: dict[str, RecordError] = {}
    reads = 0
    for path, stat in files.items():
        if not path.startswith(_IN_RECORDS) or not path.endswith(_JSON):
            continue
        try:
            entry = None if _is_racy(stat, written) else _from_cache(cached, path, stat, trust)
            reads += entry is None
            entries[path] = entry or read_entry(storage, path, trust)
        except FileNotFoundError:
            gone = True
        except SchemaError:
            raise
        except RecordError as error:
            damaged[path] = error
    return entries, damaged, reads, gone


def read_entry(storage: Storage, path: str, trust: HMACKey | None) -> Entry:
    """Read one record file. Raises `RecordError` if it cannot be read, or does not have the signature of the key."""
    entry = _checked(parse_json(read_bounded(storage, path), path), path, trust)
    if record_path(entry.record.name) != path:
        msg = f"{path}: it is the record of {entry.record.name!r}; a record has the name of its payload"
        raise RecordError(msg)
    return entry


def _checked(data: object, where: str, trust: HMACKey | None) -> Entry:
    # The signature comes first, because unsigned data may contain anything, such as a later schema.
    check_signature(data, where, trust)
    entry = Entry.from_dict(data, where)
    for record in (entry.record, entry.previous):
        if trust is not None and record is not None and not is_cryptographic(record.digest):
            msg = f"{where}: its digest {record.digest} can be forged; with trust= only sha256 is accepted"
            raise UntrustedError(msg)
    return entry


def read_bounded(storage: Storage, path: str, limit: int = MAX_RECORD_BYTES) -> bytes:
    """Read a file, and of a file over the limit only one byte more than the limit."""
    return read_small(storage, path, limit + 1)


def _cached(storage: Storage, files: Mapping[str, Stat]) -> dict[str, Any]:
    if INDEX not in files:
        return {}
    try:
        limit = _index_limit(files)
        data = parse_json(read_bounded(storage, INDEX, limit), INDEX, limit)
        return data["entries"] if data["schema"] == SCHEMA and isinstance(data["entries"], dict) else {}
    except (OSError, RecordError, KeyError, TypeError):
        return {}


def _is_racy(stat: Stat, written: float | None) -> bool:
    """Return whether a record may have been rewritten after the index was written, although its version is the same."""
    return stat.modified_s is not None and (written is None or stat.modified_s >= written)


def _index_limit(files: Mapping[str, Stat]) -> int:
    """Return the most bytes that an index of these records can have; a larger one is not read to its end."""
    records = [(path, stat.size) for path, stat in files.items() if path.startswith(f"{RECORDS}/")]
    # Text that is not ASCII takes up to three times as much in the index as in a record.
    return min(MAX_INDEX_BYTES, 1024 + sum(256 + 6 * len(path) + 4 * size for path, size in records))


def _from_cache(cached: dict[str, Any], path: str, stat: Stat, trust: HMACKey | None) -> Entry | None:
    match cached.pop(path, None):  # Taken out: the garbage collector then visits fewer objects.
        case [size, version, data] if size == stat.size and version == stat.version != "":
            try:
                entry = _checked(data, f"{INDEX}, in {path!r}", trust)
            except RecordError:
                return None
            return entry if record_path(entry.record.name) == path else None
        case _:
            return None


def save(storage: Storage, listing: Listing) -> None:
    """Write the cache of these records, without those that may change while their version stays the same."""
    times = [
        s.modified_s for path, s in listing.files.items() if path.startswith(f"{HOME}/") and s.modified_s is not None
    ]
    newest = max(times, default=0.0)
    entries = {
        path: [stat.size, stat.version, entry.to_dict()]
        for path, entry in listing.entries.items()
        if entry.status == "committed"
        and (stat := listing.files.get(path)) is not None
        # A record of the newest second may be written again in that second, before the index is written.
        and (stat.modified_s is None or stat.modified_s < newest)
    }
    storage.write(INDEX, json.dumps({"schema": SCHEMA, "entries": entries}, separators=(",", ":")).encode())
