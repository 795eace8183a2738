"""The source of a resume: a checkpoint of the directory, or a file or directory elsewhere that starts it."""

from __future__ import annotations

import logging
import os
from typing import Any, Final

import attrs

from checkpointer import CheckpointManager
from checkpointer.distributed.manager import DistributedManager
from checkpointer.errors import NotFoundError, PolicyError
from checkpointer.restore.load import Restored
from checkpointer_torch.open_any import is_place, open_foreign, open_place, own_name

__all__ = ["Origin", "find_origin"]

_log: Final = logging.getLogger("checkpointer.torch")


@attrs.frozen(kw_only=True)
class Origin:
    """The state that was read, and where."""

    state: Any
    source: str
    """The checkpoint's name; of one elsewhere its path or URL."""
    is_elsewhere: bool
    """Whether it is not a checkpoint of the directory."""


def find_origin(
    saver: CheckpointManager | DistributedManager, directory: Any, from_: Any, *, is_mapped: bool, weights_only: bool
) -> Origin | None:
    """Read the state that a resume goes on from; None if the directory is empty, and no other place is given.

    Args:
        saver: Restores from the directory.
        directory: The directory, as the loop was given it.
        from_: See `Loop.resume`.
        is_mapped: Whether it is another program's file.
        weights_only: See `Loop.resume`.

    Raises:
        PolicyError: If another program's file is meant, and ``from_`` is not a path.
        RestoreError: As for `CheckpointManager.restore` and `open_place`.
    """
    which, place = _sorted_out(from_, directory)
    if is_mapped and place is None:
        msg = f"map= names the keys of another program's file, and {from_!r} is not its path"
        raise PolicyError(msg)
    restored = _restored(saver, which, weights_only=weights_only)
    if restored is not None:
        if place is not None:
            _log.info("resumed from %s, not from %s: this directory has checkpoints", restored.record.name, place)
        return Origin(state=restored.state, source=restored.record.name, is_elsewhere=False)
    if place is None:
        return None
    found = open_foreign(place) if is_mapped and weights_only else open_place(place, weights_only=weights_only)
    return Origin(state=found.state, source=found.where, is_elsewhere=True)


def _sorted_out(from_: Any, directory: Any) -> tuple[str | int | None, str | None]:
    """Return which checkpoint of the directory is meant, or else the path or URL of another place."""
    if not is_place(from_):
        return from_, None
    name = own_name(from_, directory)
    return (name, None) if name else (None, os.fspath(from_))


def _restored(
    saver: CheckpointManager | DistributedManager, which: str | int | None, *, weights_only: bool
) -> Restored | None:
    try:
        return saver.restore(which, weights_only=weights_only)
    except NotFoundError as error:
        if not isinstance(which, str) or which in ("last", "best"):
            raise
        msg = f"{error}; and there is no file or directory {os.path.abspath(os.path.expanduser(which))}"
        raise NotFoundError(msg) from error
