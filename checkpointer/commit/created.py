"""When a directory was begun: the time from which the first trigger of a run counts."""

from __future__ import annotations

import contextlib
import math
from typing import Final

from checkpointer.commit import index
from checkpointer.commit.directory import Directory
from checkpointer.commit.journal import aborting
from checkpointer.errors import RecordError
from checkpointer.ports import Clock, Storage
from checkpointer.records.codec import as_number
from checkpointer.records.record import SCHEMA

CREATED: Final = f"{index.HOME}/directory.json"


def created(directory: Directory, clock: Clock) -> float:
    """Return the time from which a time trigger counts if nothing was ever saved: the start of the first writer."""
    storage = directory.storage
    found = read_created(storage)
    if found is not None or not directory.contents.is_prepared:
        return clock.time() if found is None else found
    now = clock.time()
    data = f'{{"schema": {SCHEMA}, "created": {now!r}}}'.encode()
    try:
        with aborting(storage.upload(CREATED)) as upload:
            upload.write(data)
            upload.finish()
            upload.publish(replace=False)
    except OSError as error:
        # Another writer may have created it at this very moment.
        found = read_created(storage)
        if found is not None:
            return found
        if not isinstance(error, FileExistsError):
            raise
        with contextlib.suppress(IsADirectoryError, PermissionError):  # A foreign folder or file is left.
            storage.write(CREATED, data)  # The file is damaged.
    return now


def read_created(storage: Storage) -> float | None:
    """Return when a directory was begun; None if no file says so."""
    with contextlib.suppress(FileNotFoundError, RecordError):
        data = index.parse_json(index.read_bounded(storage, CREATED), CREATED)
        found = as_number(data.get("created")) if isinstance(data, dict) else None
        if found is not None and math.isfinite(found):
            return found
    return None
