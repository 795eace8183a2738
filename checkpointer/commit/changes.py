"""The changes of existing names that one writer announces before it makes them.

A writer replaces or removes an existing file only if the file ``.checkpointer/changes/<owner>.json`` names it. No other
writer writes that file. So a process that goes on with the run finds there what may still change, even if the writer
is paused between any two of its operations: see `checkpointer.commit.terms`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import attrs

from checkpointer.commit.signing import HMACKey, check_signature, signed
from checkpointer.errors import NamingError, RecordError
from checkpointer.ports import Stat, Storage, SupportsScratch
from checkpointer.records.codec import MAX_RECORD_BYTES, Reader, parse_json, to_json
from checkpointer.records.names import check_name
from checkpointer.records.record import SCHEMA, Entry
from checkpointer.storage.reader import read_small

CHANGES: Final = ".checkpointer/changes"
MAX_CHANGES_BYTES: Final = 64 * MAX_RECORD_BYTES
"""A file of changes that is larger (bytes) is refused unread."""
_BLOCK: Final = 1024
"""The smallest block (bytes) of an ext4 disk. After a power loss a file in one block has all its bytes, or zeros."""


@attrs.frozen(kw_only=True)
class Changes:
    """What one writer has announced, and may not have finished."""

    owner: str
    entries: tuple[Entry, ...] = ()
    """``pending``: the payload of this name is replaced. ``retired``: payload and record are removed."""
    aliases: tuple[str, ...] = ()
    """Other names that may be replaced."""
    term: int = 0
    """The term that the writer held when it announced them; 0 if it held none, or if one of them is of another run."""

    @property
    def names(self) -> frozenset[str]:
        """Each name that may change."""
        return frozenset((*self.aliases, *(entry.record.name for entry in self.entries)))

    @classmethod
    def from_dict(cls, data: object, where: str) -> Changes:
        """Read what `write_changes` wrote; errors say ``where`` the bad value stands."""
        reader = Reader(data, where)
        entries, aliases = reader.raw("entries", []), reader.raw("aliases", [])
        if not isinstance(entries, list) or not isinstance(aliases, list):
            msg = f"{where}: entries and aliases are {type(entries).__name__} and {type(aliases).__name__}, not lists"
            raise RecordError(msg)
        return cls(
            owner=reader.text("owner"),
            entries=tuple(Entry.from_dict(entry, f"{where}, in 'entries'") for entry in entries),
            aliases=tuple(_alias(alias, where) for alias in aliases),
            term=reader.whole("term", 0),
        )


def _alias(alias: object, where: str) -> str:
    if not isinstance(alias, str):
        msg = f"{where}: the alias {alias!r} is not text"
        raise RecordError(msg)
    try:
        return check_name(alias)
    except NamingError as error:
        msg = f"{where}: {error}"
        raise RecordError(msg) from error


def changes_path(owner: str) -> str:
    """Return the path of a writer's changes."""
    return f"{CHANGES}/{owner}.json"


def changes_in(files: Mapping[str, Stat]) -> list[str]:
    """Return the path of each file of unfinished changes in a listing. An empty file has none."""
    return [path for path, stat in files.items() if path.startswith(f"{CHANGES}/") and stat.size]


def write_changes(storage: Storage, changes: Changes, trust: HMACKey | None) -> None:
    """Announce changes. If one of them removes or replaces a payload, they are durable on return.

    Aliases alone are not: if the power goes, this writer ends, so its announcement is not needed any more. But then it
    must not look like a damaged one. So it is durable too if it takes more than a block.
    """
    entries = [entry.to_dict() for entry in changes.entries]
    data: dict[str, Any] = {"schema": SCHEMA, "owner": changes.owner, "entries": entries, "aliases": changes.aliases}
    data["term"] = changes.term
    text = to_json(signed(data, trust))
    put(storage, changes_path(changes.owner), text, durable=bool(entries) or len(text) > _BLOCK)


def clear_changes(storage: Storage, owner: str) -> None:
    """Say that no change is unfinished. On an object store an empty file costs fewer requests than its removal."""
    if isinstance(storage, SupportsScratch):
        storage.delete_scratch(changes_path(owner))
    else:
        storage.write(changes_path(owner), b"")


def put(storage: Storage, path: str, data: bytes, *, durable: bool) -> None:
    """Write a small file. If it need not be ``durable``, the storage may be quicker."""
    if not durable and isinstance(storage, SupportsScratch):
        storage.write_scratch(path, data)
    else:
        storage.write(path, data)


def read_changes(storage: Storage, path: str, trust: HMACKey | None) -> Changes | None:
    """Return the unfinished changes in this file; None if there are none.

    Raises:
        RecordError: If they cannot be read or trusted.
    """
    try:
        data = read_small(storage, path, MAX_CHANGES_BYTES + 1)
    except FileNotFoundError:
        return None
    if not data:
        return None
    if not data.strip(b"\0"):  # Aliases were announced, and a power loss took the bytes.
        return Changes(owner=path[len(CHANGES) + 1 : -len(".json")])
    found = parse_json(data, path, MAX_CHANGES_BYTES)
    check_signature(found, path, trust)
    changes = Changes.from_dict(found, path)
    if changes_path(changes.owner) != path:
        msg = f"{path}: it has the changes of {changes.owner!r}; the file has the name of its writer"
        raise RecordError(msg)
    return changes
