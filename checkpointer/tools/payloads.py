"""Finds the payload at a path or URL, with its record if it has one. It needs no directory of records."""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from checkpointer.commit.index import HOME, RECORDS, record_path
from checkpointer.commit.signing import HMACKey
from checkpointer.errors import CorruptError, NotFoundError
from checkpointer.ports import Storage
from checkpointer.records.record import Record
from checkpointer.tools.catalog import Catalog, look_at

if TYPE_CHECKING:
    from checkpointer.formats.inspection.tensors import Tensors


@attrs.frozen(kw_only=True)
class Payload:
    """A file or folder that may hold tensors."""

    place: str
    """The path or URL, as it was given."""
    storage: Storage = attrs.field(repr=False)
    name: str
    """Its path in the storage; empty if it is the storage itself, as a folder."""
    record: Record | None = None
    """Its record, if it is a checkpoint of a directory."""
    problem: str = ""
    """Why its record cannot be read or believed; empty if it can, or if there is none."""
    catalog: Catalog | None = attrs.field(default=None, repr=False)
    """The directory of its record, if it has one that this library looked for."""

    @classmethod
    def of(cls, catalog: Catalog, record: Record) -> Payload:
        """Return a checkpoint of a directory."""
        return cls(place=catalog.place, storage=catalog.storage, name=record.name, record=record, catalog=catalog)


@contextlib.contextmanager
def opened(payload: Payload, *, verifies: bool = True) -> Iterator[Tensors]:
    """Open a payload. If it has a record and is verified, what is read are bytes that were compared with the record.

    Raises:
        CorruptError: If the payload differs from its record, or the record cannot be read or believed.
        NotFoundError: If a running process has retired it meanwhile.
    """
    # Commands that only list would wait for this module, and those that only look for the next one.
    from checkpointer.formats.inspection.payload import open_contents

    storage, record, catalog = payload.storage, payload.record, payload.catalog
    if payload.problem and verifies:
        raise CorruptError(payload.problem)
    retired = catalog.naming_retired(record) if catalog and record else contextlib.nullcontext()
    opening = open_contents(storage, payload.name)
    if record is not None and verifies:
        from checkpointer.restore.verified import open_verified

        opening = open_verified(storage, record)
    with retired, opening as contents:
        yield contents


def payload_at(place: str, open: Callable[[str], Storage], trust: HMACKey | None = None) -> Payload | None:
    """Return the payload at a path or URL; None if a directory of checkpoints is there, or only directories below it.

    Args:
        place: The path or URL of a file or folder.
        open: Opens the storage of a directory.
        trust: The key of signed records.

    Raises:
        NotFoundError: If there is nothing.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from checkpointer.storage import open_storage
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "model.pt")
        ...     size = path.write_bytes(b"data")
        ...     payload_at(str(path), lambda place: open_storage(place, "")).name
        'model.pt'
    """
    protocol, separator, rest = place.partition("://")
    if not separator or protocol in ("file", "local"):
        return _local(place, rest if separator else place, open, trust)
    parent, slash, name = place.rstrip("/").rpartition("/")
    if not slash or parent.endswith("/"):  # The root of a bucket or server.
        parent, name = place, ""
    storage = open(parent)
    files = storage.list(name)
    if not files:
        msg = f"there is no file or folder {place}"
        raise NotFoundError(msg)
    home = f"/{HOME}/" if not name else f"{name}/{HOME}/"
    if name not in files and any(home in f"/{path}" for path in files):
        return None
    return _with_record(Payload(place=place, storage=storage, name=name), trust)


def _local(place: str, path: str, open: Callable[[str], Storage], trust: HMACKey | None) -> Payload | None:
    given = Path(path).expanduser()
    if not given.exists():
        msg = f"there is no file or folder {path}{similar(given.absolute())}"
        if given.is_symlink():
            msg = f"{path} is a link to {os.readlink(given)}, which is not there"
        raise NotFoundError(msg)
    # The payload of an alias that is a link has its record under its own name.
    real = Path(os.path.realpath(given))
    if (real / RECORDS).is_dir():  # Else all of it is listed, because a directory below may have records.
        return None
    if real.is_dir() and any(f"/{HOME}/" in f"/{path}" for path in open(str(real)).list()):
        return None
    for folder, name in directories_above(real):
        found = _with_record(Payload(place=place, storage=open(str(folder)), name=name), trust)
        if found.record is not None or found.problem:
            return found
    return Payload(place=place, storage=open(str(real.parent)), name=real.name)


def directories_above(path: Path) -> Iterator[tuple[Path, str]]:
    """Yield each directory above a path that has records, the closest first, and the path within it.

    Directories whose records another user keeps private are left out.
    """
    for folder in path.parents:
        if os.path.isdir(folder / RECORDS):  # Path.is_dir would raise.
            yield folder, path.relative_to(folder).as_posix()


def similar(path: Path, *, folders: bool = False) -> str:
    """Return a hint: the closest file or folder beside the one that is not there."""
    parent = path
    while not parent.parent.is_dir():
        parent = parent.parent
    try:
        names = [entry.name for entry in parent.parent.iterdir() if not folders or entry.is_dir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(parent.name, names, n=1, cutoff=0.65)
    return f" (did you mean {parent.parent / close[0]}?)" if close else ""


def _with_record(payload: Payload, trust: HMACKey | None) -> Payload:
    """Return the payload with what its directory says about it, if it has a record there."""
    name, storage, path = payload.name, payload.storage, record_path(payload.name)
    if path not in storage.list(path):
        return payload
    catalog = look_at(storage, trust)
    record = catalog.current(name)
    half_way = f"{name} is not committed: its record says that it is half-way"
    problem = "" if record is not None else str(catalog.damaged.get(path, half_way))
    return attrs.evolve(payload, record=record, problem=problem, catalog=catalog)
