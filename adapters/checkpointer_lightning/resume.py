"""What a training continues from: what ``ckpt_path="last"`` and ``"best"`` name, and a callback's loaded state."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any, Final, Literal

import attrs
import torch
from fsspec.core import url_to_fs

from checkpointer import CheckpointManager, Policy, Save
from checkpointer._secrets import shown_place
from checkpointer.errors import CheckpointerError, NotFoundError, warn
from checkpointer.formats.inspection.payload import open_stream
from checkpointer.policy.naming import fixed_parts
from checkpointer.storage import open_storage
from checkpointer.storage.owner import temporary_owner
from checkpointer_lightning.several_callbacks import is_local, name_in, policy_and_label

_OPTIONS: Final = ("storage_options", "trust", "mirror")
"""Options of a manager that matter when it only looks."""
_COPIES: Final = "checkpointer-resume-"
_LIGHTNINGS: Final = "pytorch-lightning_version"
"""A key of each checkpoint of Lightning."""


@attrs.define
class Resume:
    """What the training of one callback continues from."""

    state: Mapping[str, Any] = attrs.field(factory=dict)
    """The manager's state as it was last."""
    is_loaded: bool = False
    """Whether this training continues from `state`."""
    scores: Mapping[str, Any] = attrs.field(factory=dict)
    """Path and score of the files of Lightning's own class, if this training continues from there."""
    attributes: Mapping[str, Any] = attrs.field(factory=dict)
    """The callback's attributes before a state was loaded."""
    found: str | None = None
    """The path that ``ckpt_path="last"`` was resolved to."""

    def apply(self, manager: CheckpointManager, policy: Policy, callback: Any, trainer: Any) -> None:
        """Let the manager continue from what was loaded, or from the callback's last training by the same Trainer."""
        if not policy.name.version_counter:
            manager.session.let_replace(_overwritten(manager, policy, callback._folder, trainer))
        again = callback._last_trainer is not None and callback._last_trainer() is trainer
        state = self.state if self.is_loaded or again else None
        if self.scores:
            _adopt(manager, callback._folder, self.scores, callback.monitor)
            state = manager.session.state_dict()
        if state:
            name = self._chosen_name(policy, callback._folder, trainer)
            is_own = name in manager.session.manifest.by_name and name not in policy.aliases
            manager.session.load_state_dict(state, source=name if is_own else "")

    def _chosen_name(self, policy: Policy, folder: str, trainer: Any) -> str:
        """Return the name of the checkpoint whose path the user gave to resume from; empty if there is none."""
        if not (self.is_loaded or self.scores) or trainer.ckpt_path in (None, "", self.found):
            return ""
        naming = policy.name
        if naming.template is not None and fixed_parts(naming.template, naming.join) == naming.template:
            return ""  # A fixed name means the newest, or the best. Its file is replaced, as in Lightning.
        return name_in(folder, trainer.ckpt_path)


def find_valid(which: Literal["last", "best"], callback: Any, trainer: Any) -> str | None:
    """Return the path of the newest or the best whole checkpoint; None if there is no record at all.

    If only the mirror has it, it is fetched first. If the alias ``last`` names the newest, the alias is returned. A
    Trainer has no ``storage_options``, so with them a copy on this machine is returned. If no rule of the policy ranks,
    the best is the newest. If the Trainer does not fit, checkpoints that have only weights count too.

    Raises:
        NoValidCheckpointError: If there are checkpoints, and none of them is whole: a run never starts over silently.
    """
    directory, (policy, label) = callback._resolve_folder(trainer), policy_and_label(callback, trainer)
    options = {name: value for name, value in callback._options.items() if name in _OPTIONS}
    if is_local(directory) and not os.path.isdir(directory) and options.get("mirror") is None:
        return None
    if which == "best" and not policy.keep:
        return None
    contents: Literal["full", "any"] = "full" if trainer.state.fn == "fit" else "any"
    with contextlib.closing(CheckpointManager(directory, policy, label=label, **options)) as manager:
        found = None
        with contextlib.suppress(NotFoundError):  # No checkpoint is ranked yet.
            found = manager.session.locate(which if policy.ranking else "last", contents=contents)
        alias = manager.policy.name.last_file
    if found is None:
        return None
    record, path = found
    if not is_local(directory):
        return _copy(directory, record.name, options["storage_options"]) if options.get("storage_options") else path
    path, alias = (os.path.join(directory, name) for name in (record.name, alias))
    is_alias = which == "last" and os.path.exists(alias) and os.path.samefile(alias, path)
    return alias if is_alias else path


def _copy(directory: str, name: str, storage_options: Mapping[str, Any]) -> str:
    with temporary_owner() as owner:
        storage = open_storage(directory, owner, storage_options)
        path = os.path.join(tempfile.mkdtemp(prefix=_COPIES), os.path.basename(name))
        with storage.open(name) as source, open(path, "xb") as target:
            shutil.copyfileobj(source, target, 4 << 20)
        return path


def remove_copies(*paths: str | None) -> None:
    """Remove the copies that `find_valid` has made, once they are loaded; other paths are left alone."""
    for path in paths:
        folder = os.path.dirname(path or "")
        if os.path.basename(folder).startswith(_COPIES) and os.path.dirname(folder) == tempfile.gettempdir():
            shutil.rmtree(folder, ignore_errors=True)


def _adopt(manager: CheckpointManager, directory: str, scores: Mapping[str, Any], monitor: str | None) -> None:
    """Adopt the files that Lightning ranked, with their scores. A file that cannot be read is left alone."""
    found = sorted((*_progress_of(path), path) for path in scores if _is_in(directory, path))
    for step, epoch, path in found:
        if step < 0:
            msg = f"{shown_place(path)} is not adopted: its step cannot be read; it is neither ranked nor removed"
            warn(msg)
            continue
        metrics = {} if monitor is None else {monitor: scores[path]}
        decision = manager.session.decide(metrics, step, epoch, due="Lightning had saved it")
        if isinstance(decision, Save):
            manager.session.commit(decision, path)


def _overwritten(manager: CheckpointManager, policy: Policy, folder: str, trainer: Any) -> list[str]:
    """Return the checkpoints of Lightning's own class, which have no record, and which new ones may replace.

    The file that the training resumes from is one of them only under the name of an alias: an alias is replaced when
    the checkpoint that it stands for is there.
    """
    source = name_in(folder, trainer.ckpt_path) if trainer.ckpt_path else ""
    foreign = manager.session.manifest.foreign - ({source} - {*policy.aliases})
    return [name for name in foreign if name.endswith(policy.name.suffix) and _is_lightnings(folder, name)]


def _is_lightnings(folder: str, name: str) -> bool:
    with contextlib.suppress(OSError, CheckpointerError):
        filesystem, path = url_to_fs(f"{folder}/{name}")
        if filesystem.isfile(path):
            with contextlib.closing(open_stream(filesystem.open(path, "rb"), name)) as contents:
                return _LIGHTNINGS in contents.others
    return False


def _is_in(directory: str, path: str) -> bool:
    if name_in(directory, path).startswith(".."):
        return False
    filesystem, name = url_to_fs(path)
    return bool(filesystem.isfile(name))


def _progress_of(path: str) -> tuple[int, int]:
    try:
        filesystem, name = url_to_fs(path)
        with filesystem.open(name, "rb") as stream:
            state = torch.load(stream, map_location="meta", weights_only=True)
        return int(state["global_step"]), int(state["epoch"])
    except Exception:  # The file is not this library's, and its content must not end the training.
        return -1, -1
