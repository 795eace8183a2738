"""The source of a resume: a checkpoint of the directory, another one elsewhere, or an adopted one."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, Final

import attrs

from checkpointer import CheckpointManager
from checkpointer._secrets import shown_place
from checkpointer.distributed.manager import DistributedManager
from checkpointer.errors import MismatchError, NotFoundError, PolicyError, warn
from checkpointer_torch.foreign_file import StateMap
from checkpointer_torch.open_any import Opener, is_place, open_foreign, own_name
from checkpointer_torch.training_state import TrainingState
from checkpointer_torch.weights import load_weights

_log: Final = logging.getLogger("checkpointer.torch")


@attrs.frozen
class ResumeSource:
    """Finds the checkpoint that a resume names, and lets the training take it over."""

    _saver: CheckpointManager | DistributedManager
    _training: TrainingState
    _directory: Any
    _options: Mapping[str, Any]

    def resume(self, from_: Any, names: StateMap, *, strict: bool, weights_only: bool) -> bool:
        """Return whether there was a checkpoint. Arguments and errors are those of `Loop.resume`."""
        if not names and from_ in (None, "last") and self._take_adopted(strict=strict):
            return True
        which, place = from_, None
        if is_place(from_):
            which = None if names else own_name(from_, self._directory)
            place = None if which else os.fspath(from_)
        if names and place is None:
            msg = f"map= names the keys of another program's file, and {from_!r} is not its path"
            raise PolicyError(msg)
        # What was adopted is not of this loop: it is read by the map.
        is_foreign = bool(names) and self._saver.last is not None and self._saver.last.is_adopted
        found = None if is_foreign else self._restored(which, place, weights_only=weights_only)
        if found is not None:
            state, source = found
            differences = self._training.put(state, source, strict=strict)
        elif place is None:
            return False
        elif names:
            state, source = open_foreign(place) if weights_only else Opener(weights_only=False).open(place)
            differences = self._training.put_foreign(state, names, source, strict=strict)
        else:
            state, source = Opener(weights_only=weights_only).open(place)
            differences = self._training.put(state, source, strict=strict)
        if differences:
            untaken = f"; not loaded at all: {', '.join(differences.untaken)}" if differences.untaken else ""
            msg = f"{source} does not fit, and what did was loaded: {differences}{untaken}"
            warn(msg)
        return True

    def _restored(self, which: Any, place: str | None, *, weights_only: bool) -> tuple[Any, str] | None:
        """Return the state and name of a checkpoint of the directory; None if the directory has none."""
        try:
            with self._training.reading():
                restored = self._saver.restore(which, weights_only=weights_only)
        except NotFoundError as error:
            if not isinstance(which, str) or which in ("last", "best"):
                raise
            msg = f"{error}; and {os.path.abspath(os.path.expanduser(which))} is neither a file nor a directory"
            raise NotFoundError(msg) from error
        if restored is None:
            return None
        if place is not None:
            _log.info(
                "resumed from %s, not from %s: this directory has checkpoints", restored.record.name, shown_place(place)
            )
        return restored.state, restored.record.name

    def _take_adopted(self, *, strict: bool) -> bool:
        """Load the weights of the newest checkpoint if it was adopted, and take step and epoch from its record.

        Return False for any other checkpoint, after doing nothing.
        """
        saver, training = self._saver, self._training
        if saver.last is None or not saver.last.is_adopted:
            return False
        source: Any
        if isinstance(saver, CheckpointManager) and isinstance(self._directory, (str, os.PathLike)):
            record, source = saver.session.locate(contents="any") or (None, None)
        else:
            with training.reading():
                restored = saver.restore(contents="any")
            record, source = (restored.record, restored.state) if restored else (None, None)
        if record is None or not record.is_adopted:
            return False
        modules = training.objects.modules
        options = {name: self._options.get(name) for name in ("trust", "storage_options")}
        for name, module in modules.items():
            try:
                load_weights(module, source, part=name if len(modules) > 1 else None, strict=strict, **options)
            except MismatchError as error:
                msg = f"{error}. In a Loop: resume({record.name!r} with its path, map={{{name!r}: KEY}})"
                raise MismatchError(msg) from error
        training.begin_at(record)
        others = [name for name in training.objects.names if name not in modules]
        anew = f"; these begin anew: {', '.join(others)}" if others else ""
        msg = (
            f"{record.name} was adopted, so another program wrote it. Loaded were the weights of {', '.join(modules)}, "
            f"and step {record.step} of its record. The training begins with epoch {training.epoch}{anew}"
        )
        warn(msg)
        return True
