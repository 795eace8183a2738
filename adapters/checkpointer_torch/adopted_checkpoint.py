"""Goes on from a checkpoint that another program wrote, and ``checkpointer adopt`` made a record of."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

from checkpointer import CheckpointerWarning, CheckpointManager, Record
from checkpointer.distributed.manager import DistributedManager
from checkpointer.ports import Storage
from checkpointer_torch.training_state import Training
from checkpointer_torch.weights import load_weights

__all__ = ["begin_from_adopted"]


def begin_from_adopted(
    saver: CheckpointManager | DistributedManager,
    training: Training,
    *,
    directory: str | os.PathLike[str] | Storage | None,
    options: Mapping[str, Any],
    strict: bool,
) -> bool:
    """Load the weights of the newest checkpoint if it was adopted, and take step and epoch from its record.

    Returns:
        Whether it was. If not, nothing was done.

    Raises:
        MismatchError: If the weights do not fit; nothing was loaded.
        RestoreError: As for `CheckpointManager.restore`.
    """
    newest = saver.last
    if newest is None or not newest.is_adopted:
        return False
    record, source = _found(saver, directory)
    if record is None or not record.is_adopted:
        return False
    modules = training.modules
    options = {"trust": options.get("trust"), "storage_options": options.get("storage_options")}
    for name, module in modules.items():
        load_weights(module, source, part=name if len(modules) > 1 else None, strict=strict, **options)
    training.begin_at(record)
    others = [name for name in training.names if name not in modules]
    anew = f"; these begin anew: {', '.join(others)}" if others else ""
    msg = (
        f"{record.name} was adopted, so another program wrote it. Loaded were the weights of {', '.join(modules)}, "
        f"and step {record.step} of its record. The training begins with epoch {training.epoch}{anew}"
    )
    warnings.warn(msg, CheckpointerWarning, stacklevel=3)
    return True


def _found(
    saver: CheckpointManager | DistributedManager, directory: str | os.PathLike[str] | Storage | None
) -> tuple[Record | None, Any]:
    """Return the newest valid checkpoint's record, and its path or URL, or else its state."""
    if isinstance(saver, CheckpointManager) and isinstance(directory, (str, os.PathLike)):
        return saver.session.locate(contents="any") or (None, None)
    restored = saver.restore(contents="any")
    return (restored.record, restored.state) if restored else (None, None)
