"""Marks of the processes that write to a directory, so that no command changes it at the same time.

A manager writes its mark before its first change, and removes it when it is closed. No save depends on a mark: if it
is missing or stale, a run saves and restores as before.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from typing import Final

from checkpointer.commit.changes import changes_path
from checkpointer.commit.index import HOME, parse_json, read_bounded
from checkpointer.errors import AliasInUseError, RecordError, StorageError
from checkpointer.ports import Storage
from checkpointer.records.record import SCHEMA
from checkpointer.storage.owner import has_ended, host_of, is_live, machine

WRITERS: Final = f"{HOME}/writers"
_JSON: Final = ".json"


def mark(storage: Storage, owner: str) -> None:
    """Mark this writer as running. Raises `StorageError` if the mark cannot be written."""
    data = {"schema": SCHEMA, "owner": owner, "machine": machine()}
    try:
        storage.write(_path(owner), json.dumps(data).encode())
    except OSError as error:
        msg = f"cannot write to {storage}: {error}; choose a directory that this process may write to"
        raise StorageError(msg) from error


def is_marked(storage: Storage, owner: str) -> bool:
    """Return whether the mark of this writer exists."""
    return bool(storage.list(_path(owner)))


def unmark(storage: Storage, owner: str) -> None:
    """Remove the mark of this writer, if it exists, and its file of changes if that is empty."""
    with contextlib.suppress(OSError):
        storage.delete(_path(owner))
        if any(stat.size == 0 for stat in storage.list(changes_path(owner)).values()):
            storage.delete(changes_path(owner))


def writers_in(storage: Storage, files: Iterable[str] | None = None) -> list[str]:
    """Return the owner of each mark; ``files`` saves the listing."""
    paths = storage.list(WRITERS) if files is None else files
    found = [path[len(WRITERS) + 1 : -len(_JSON)] for path in paths if path.startswith(f"{WRITERS}/")]
    return sorted(owner for owner in found if owner and "/" not in owner)


def clear_ended(storage: Storage, owners: Iterable[str], *, force: bool = False) -> list[str]:
    """Remove the marks of writers that have certainly ended, and return the owners of the others.

    With ``force`` also remove the marks of writers on other machines, which may be alive.
    """
    left = []
    for owner in owners:
        if _has_ended(storage, owner) or (force and not is_live(owner)):
            unmark(storage, owner)
        else:
            left.append(owner)
    return left


def refuse_if_live(storage: Storage, place: str, others: Iterable[str] = ()) -> None:
    """Raise `AliasInUseError` if a process writes to the directory, or may do so on another machine.

    ``others`` are owners of unfinished writes and aliases. They count only if they are certainly alive.
    """
    owners = [owner for owner in others if is_live(owner)]
    owners += [owner for owner in writers_in(storage) if not _has_ended(storage, owner)]
    for owner in owners:
        if is_live(owner):
            msg = f"{describe(owner)} is writing to {place}; nothing was changed. Wait for its end"
        else:
            msg = (
                f"{describe(owner)} may be writing to {place}; nothing was changed. Wait for its end. If you know that "
                f"it has ended, run 'checkpointer sweep {place} --force' first"
            )
        raise AliasInUseError(msg)


def describe(owner: str) -> str:
    """Return a text that names the process, and its machine if it is another one."""
    pid = owner.split("~")[1] if "~" in owner else owner
    return f"process {pid}" if is_live(owner) else f"process {pid} on another machine ({host_of(owner)})"


def _has_ended(storage: Storage, owner: str) -> bool:
    return has_ended(owner, lambda: _machine_of(storage, owner))


def _machine_of(storage: Storage, owner: str) -> str:
    with contextlib.suppress(OSError, RecordError):
        data = parse_json(read_bounded(storage, _path(owner)), _path(owner))
        found = data.get("machine") if isinstance(data, dict) else None
        return found if isinstance(found, str) else ""
    return ""


def _path(owner: str) -> str:
    return f"{WRITERS}/{owner}{_JSON}"
