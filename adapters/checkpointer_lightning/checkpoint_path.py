"""What ``ckpt_path="last"`` and ``"best"`` mean: the newest, or the best, checkpoint that is whole."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any, Final, Literal

from checkpointer import CheckpointManager, Policy
from checkpointer.errors import NotFoundError
from checkpointer.storage import open_storage
from checkpointer.storage.owner import new_owner, release
from checkpointer_lightning.places import is_local

__all__ = ["LOOKING", "find_valid", "forget_copy"]

LOOKING: Final = ("storage_options", "trust", "mirror")
"""Options of a manager that matter when it only looks."""
_COPIES: Final = "checkpointer-resume-"


def find_valid(
    which: Literal["last", "best"],
    directory: str,
    policy: Policy,
    *,
    label: str,
    options: Mapping[str, Any],
    contents: Literal["full", "any"],
) -> str | None:
    """Return where the newest or the best whole checkpoint is; None if there is no record at all.

    With a mirror, what only that has is fetched first. The alias ``last`` is returned if it names the newest: it is
    what people know. Behind ``storage_options``, which a Trainer does not have, a copy on this machine is returned.

    Args:
        which: ``"best"`` means the newest where no rule of the policy ranks.
        directory: Folder or URL.
        policy: The callback's.
        label: Its label in the directory.
        options: Its options for a manager.
        contents: ``"any"`` also takes checkpoints that hold only weights.

    Raises:
        NoValidCheckpointError: If there are checkpoints, and none is whole: nothing starts over silently.
    """
    if is_local(directory) and not os.path.isdir(directory) and options.get("mirror") is None:
        return None
    if which == "best" and not policy.keep:
        return None
    with contextlib.closing(CheckpointManager(directory, policy, label=label, **options)) as looking:
        found = None
        with contextlib.suppress(NotFoundError):  # Nothing is ranked yet.
            found = looking.session.locate(which if policy.ranking else "last", contents=contents)
        alias = looking.policy.name.last_file
    if found is None:
        return None
    record, path = found
    if not is_local(directory):
        return _copy_here(directory, record.name, options) if options.get("storage_options") else path
    path, alias = (os.path.join(directory, name) for name in (record.name, alias))
    is_alias = which == "last" and os.path.exists(alias) and os.path.samefile(alias, path)
    return alias if is_alias else path


def _copy_here(directory: str, name: str, options: Mapping[str, Any]) -> str:
    owner = new_owner()
    try:
        storage = open_storage(directory, owner, options["storage_options"])
        path = os.path.join(tempfile.mkdtemp(prefix=_COPIES), os.path.basename(name))
        with storage.open(name) as source, open(path, "xb") as target:
            shutil.copyfileobj(source, target, 4 << 20)
    finally:
        release(owner)
    return path


def forget_copy(path: str | None) -> None:
    """Remove what `find_valid` has copied, once it is loaded."""
    folder = os.path.dirname(path or "")
    if os.path.basename(folder).startswith(_COPIES) and os.path.dirname(folder) == tempfile.gettempdir():
        shutil.rmtree(folder, ignore_errors=True)
