"""Which checkpoint to resume from."""

from __future__ import annotations

import os
from pathlib import Path

from checkpointer import HMACKey
from checkpointer.commit.index import HOME
from checkpointer.errors import NoValidCheckpointError
from checkpointer.storage import open_storage
from checkpointer.storage.owner import new_owner, release
from checkpointer.tools.catalog import look_at
from checkpointer_transformers.cleanup import by_name, look
from checkpointer_transformers.lock import Claim

__all__ = ["last_valid_checkpoint"]


def last_valid_checkpoint(directory: str | os.PathLike[str], *, trust: HMACKey | None = None) -> str | None:
    """Return the path of the newest whole ``checkpoint-<step>`` in a Trainer's directory; changes nothing.

    One that a `CheckpointCallback` has committed is compared with its digest. One without a record was written by a
    Trainer without this callback, and counts if all its files are there and none is torn. Pass it on:
    ``trainer.train(resume_from_checkpoint=last_valid_checkpoint(args.output_dir))``.

    Args:
        directory: The Trainer's ``output_dir``.
        trust: The key, if the records are signed.

    Returns:
        The path, or None if there is nothing to resume from.

    Raises:
        NoValidCheckpointError: If checkpoints were committed, and none of them is whole.
    """
    folder, owner = Path(directory), new_owner()
    if not folder.is_dir():
        return None
    storage = open_storage(folder, owner)
    try:
        with_records = (folder / HOME).is_dir()
        records = by_name(look_at(storage, trust)) if with_records else {}
        problems = []
        for found in look(storage, folder, records, Claim.of(storage)):
            if found.record is not None and found.record.contents == "weights":
                continue
            if found.problem is None:
                return os.path.join(directory, found.name)
            problems += [found.problem] if found.record is not None else []
    finally:
        release(owner)
    if problems:
        msg = f"no valid checkpoint in {folder}: {'; '.join(problems)}. Training does not start over silently"
        raise NoValidCheckpointError(msg)
    return None
