"""What ``ckpt_path="last"`` means: the newest checkpoint that is whole."""

from __future__ import annotations

import os

from checkpointer import CheckpointManager, Naming, Record, Restored
from checkpointer.owner import new_owner
from checkpointer.restoring import load_first_valid, verify
from checkpointer.storage import open_storage

__all__ = ["newest_valid"]


def newest_valid(directory: str, naming: Naming, label: str) -> str | None:
    """Return the path of the newest whole checkpoint that can resume a run; None if there is no record at all.

    The alias is returned if it names that one: it is what people know.

    Raises:
        NoValidCheckpointError: If there are checkpoints, and none is whole: nothing starts over silently.
    """
    if not os.path.isdir(directory):
        return None
    looking = CheckpointManager(directory, label=label)
    records = [record for record in reversed(looking.manifest.live) if record.contents == "full"]
    storage = open_storage(directory, new_owner())

    def check(record: Record) -> Restored:
        verify(storage, record)
        return Restored(record=record, state=None)

    found = load_first_valid(records, check, lambda record: None)
    if found is None:
        return None
    path, alias = (os.path.join(directory, name) for name in (found.record.name, naming.last_file))
    return alias if os.path.exists(alias) and os.path.samefile(alias, path) else path
