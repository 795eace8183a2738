"""Before a training: checkpoints that the Trainer must not resume from are renamed, and never deleted."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import attrs

from checkpointer import CheckpointerWarning, Record
from checkpointer.commit.index import HOME, record_path
from checkpointer.errors import CorruptError
from checkpointer.ports import Storage
from checkpointer.restore.load import verify
from checkpointer.storage import open_storage
from checkpointer.storage.digests import size_of
from checkpointer.storage.owner import new_owner, release
from checkpointer.tools.catalog import Catalog, look_at
from checkpointer.tools.sweep import sweep
from checkpointer_transformers.integrity import checkpoints_of, problem_of, step_of
from checkpointer_transformers.lock import Claim

__all__ = ["Found", "by_name", "clear", "look"]

_ASIDE: Final = f"{HOME}/aside"
"""Where the records of renamed checkpoints are."""


@attrs.frozen(kw_only=True)
class Found:
    """A checkpoint by the Trainer's naming."""

    name: str
    record: Record | None
    """None if the callback has not committed it."""
    problem: str | None
    """Why it cannot be resumed from; None if it is whole."""


def look(storage: Storage, folder: Path, records: Mapping[str, Record], claim: Claim) -> Iterator[Found]:
    """Return what there is, newest first; the newest whole one is compared with its digest, older ones by size."""
    names = {*checkpoints_of(folder), *(name for name in records if step_of(name) is not None)}
    is_newest = True
    for name in sorted(names, key=lambda name: step_of(name) or 0, reverse=True):
        record = records.get(name)
        if record is not None:
            problem = _differs(storage, record, thoroughly=is_newest)
        else:
            problem = problem_of(folder / name, ranks=claim.ranks if name == claim.writing else None)
        is_newest = is_newest and problem is not None
        yield Found(name=name, record=record, problem=problem)


def _differs(storage: Storage, record: Record, *, thoroughly: bool) -> str | None:
    if not thoroughly and size_of(storage, record.name, record.size) == record.size:
        return None
    try:
        verify(storage, record)
    except CorruptError as error:
        return str(error)
    return None


def clear(folder: Path, options: Mapping[str, Any]) -> None:
    """Rename what is not whole, with a warning. If a live process trains here, nothing changes."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    owner = new_owner()
    storage = open_storage(folder, owner)
    try:
        claim = Claim.of(storage)
        if claim.is_live:
            return
        for found in list(look(storage, folder, _settled(storage, owner, options), claim)):
            if found.problem is not None:
                _rename(storage, folder, found)
    finally:
        release(owner)


def _settled(storage: Storage, owner: str, options: Mapping[str, Any]) -> Mapping[str, Record]:
    """Return the records, after a dead process's unfinished changes are finished or undone."""
    if not storage.list(HOME):
        return {}
    sweep(storage, owner, options.get("trust"))
    return by_name(look_at(storage, options.get("trust")))


def by_name(catalog: Catalog) -> Mapping[str, Record]:
    """Return the records by their names, those included whose payload is gone."""
    return {record.name: record for record in catalog.with_missing.records}


def _rename(storage: Storage, folder: Path, found: Found) -> None:
    msg = f"{folder / found.name} is not a whole checkpoint: {found.problem}"
    if (folder / found.name).exists():
        name = _free(folder, f"incomplete-{found.name}" if found.record is None else f"damaged-{found.name}")
        os.rename(folder / found.name, folder / name)
        msg += f". It is {name} now, so that nothing resumes from it; delete it if you do not need it"
    if found.record is not None:
        path = folder / record_path(found.name)
        (folder / _ASIDE).mkdir(exist_ok=True)
        aside = _free(folder / _ASIDE, path.name)
        os.replace(path, folder / _ASIDE / aside)
        msg += f". Its record is {_ASIDE}/{aside} now"
    warnings.warn(msg, CheckpointerWarning, stacklevel=2)


def _free(folder: Path, stem: str) -> str:
    name, version = stem, 0
    while os.path.lexists(folder / name):
        version += 1
        name = f"{stem}-v{version}"
    return name
