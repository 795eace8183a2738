"""The source of a resume: a checkpoint of the directory, another one elsewhere, or an adopted one."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from typing import Any, Final

import attrs

from checkpointer import CheckpointerWarning, CheckpointManager
from checkpointer.distributed.manager import DistributedManager
from checkpointer.errors import NotFoundError, PolicyError
from checkpointer_torch.open_any import is_place, open_foreign, open_place, own_name
from checkpointer_torch.training_state import TrainingState
from checkpointer_torch.weights import load_weights

__all__ = ["Source", "find_source", "resume_from_adopted"]

_log: Final = logging.getLogger("checkpointer.torch")


@attrs.frozen(kw_only=True)
class Source:
    """The state that was read, and its origin."""

    state: Any
    name: str
    """The checkpoint's name; its path or URL if it is elsewhere."""
    is_elsewhere: bool
    """Whether it is not a checkpoint of the directory."""


def find_source(
    saver: CheckpointManager | DistributedManager, directory: Any, from_: Any, *, is_mapped: bool, weights_only: bool
) -> Source | None:
    """Read the state that a resume goes on from; None if the directory is empty, and no other place is given."""
    which, place = from_, None
    if is_place(from_):
        which = own_name(from_, directory)
        place = None if which else os.fspath(from_)
    if is_mapped and place is None:
        msg = f"map= names the keys of another program's file, and {from_!r} is not its path"
        raise PolicyError(msg)
    try:
        restored = saver.restore(which, weights_only=weights_only)
    except NotFoundError as error:
        if not isinstance(which, str) or which in ("last", "best"):
            raise
        msg = f"{error}; and {os.path.abspath(os.path.expanduser(which))} is neither a file nor a directory"
        raise NotFoundError(msg) from error
    if restored is not None:
        if place is not None:
            _log.info("resumed from %s, not from %s: this directory has checkpoints", restored.record.name, place)
        return Source(state=restored.state, name=restored.record.name, is_elsewhere=False)
    if place is None:
        return None
    found = open_foreign(place) if is_mapped and weights_only else open_place(place, weights_only=weights_only)
    return Source(state=found.state, name=found.where, is_elsewhere=True)


def resume_from_adopted(
    saver: CheckpointManager | DistributedManager,
    training: TrainingState,
    *,
    directory: Any,
    options: Mapping[str, Any],
    strict: bool,
) -> bool:
    """Load the weights of the newest checkpoint if it was adopted, and take step and epoch from its record.

    Another program wrote such a checkpoint, and ``checkpointer adopt`` its record. Return False for any other
    checkpoint, after doing nothing.
    """
    if saver.last is None or not saver.last.is_adopted:
        return False
    source: Any
    if isinstance(saver, CheckpointManager) and isinstance(directory, (str, os.PathLike)):
        record, source = saver.session.locate(contents="any") or (None, None)
    else:
        restored = saver.restore(contents="any")
        record, source = (restored.record, restored.state) if restored else (None, None)
    if record is None or not record.is_adopted:
        return False
    modules = training.objects.modules
    options = {"trust": options.get("trust"), "storage_options": options.get("storage_options")}
    for name, module in modules.items():
        load_weights(module, source, part=name if len(modules) > 1 else None, strict=strict, **options)
    training.begin_at(record)
    others = [name for name in training.objects.names if name not in modules]
    anew = f"; these begin anew: {', '.join(others)}" if others else ""
    msg = (
        f"{record.name} was adopted, so another program wrote it. Loaded were the weights of {', '.join(modules)}, "
        f"and step {record.step} of its record. The training begins with epoch {training.epoch}{anew}"
    )
    warnings.warn(msg, CheckpointerWarning, stacklevel=3)
    return True
