"""The source of a resume: a checkpoint of the directory, another one elsewhere, or an adopted one."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

import attrs

from checkpointer import CheckpointManager, Record
from checkpointer._secrets import shown_place
from checkpointer.distributed.manager import DistributedManager, find
from checkpointer.errors import CorruptError, MismatchError, NotFoundError, PolicyError, warn
from checkpointer_torch.open_any import Opener, is_place, open_foreign, own_name
from checkpointer_torch.resume_from_foreign import StateMap
from checkpointer_torch.state_differences import Differences
from checkpointer_torch.training_state import TrainingState
from checkpointer_torch.weights import PickedWeights, picked_weights

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
        which, place = from_, None
        if is_place(from_):
            which = None if names else own_name(from_, self._directory)
            place = None if which else os.fspath(from_)
        if names and place is None:
            msg = f"map= names the keys of another program's file, and {from_!r} is not its path"
            raise PolicyError(msg)
        record = self._find(which)
        is_adopted = record is not None and record.is_adopted
        if place is None and record is not None and is_adopted and self._take_adopted(which, record, strict=strict):
            return True
        # What was adopted is not of this loop, so it does not stand for the place.
        found = None if is_adopted and place else self._restored(which, place, weights_only=weights_only)
        if found is None and place is None:
            return False
        if found is None:
            self._take_from(place or "", names, strict=strict, weights_only=weights_only)
        else:
            state, source = found
            _warn_of(self._training.put(state, source, strict=strict), source)
        return True

    def _find(self, which: Any) -> Record | None:
        """Return the checkpoint of the directory that is meant; None if it has none, or if only a restore finds it."""
        with contextlib.suppress(NotFoundError):
            if isinstance(self._saver, DistributedManager):
                return find(self._saver, which)
            return self._saver.session.find(which)
        return None

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

    def _take_from(self, place: str, names: StateMap, *, strict: bool, weights_only: bool) -> None:
        """Take over the checkpoint at a path or URL elsewhere, or the file of another program."""
        record = Opener().record_of(place)
        if record is not None and not record.is_adopted:
            record = None
        if not names and record is not None:
            weights = self._picked(place, place, Opener(), strict=strict)
            return self._go_on_at(record, weights)
        if names:
            state, source = open_foreign(place, weights_only=weights_only)
            differences = self._training.put_foreign(state, names, source, strict=strict, record=record)
        else:
            state, source = Opener(weights_only=weights_only).open(place)
            differences = self._training.put(state, source, strict=strict)
        return _warn_of(differences, source)

    # What was adopted

    def _take_adopted(self, which: Any, record: Record, *, strict: bool) -> bool:
        """Load the weights of an adopted checkpoint of the directory, and take step and epoch from its record.

        Return False if it turns out that another checkpoint is meant, after doing nothing.
        """
        saver = self._saver
        if isinstance(saver, CheckpointManager) and isinstance(self._directory, (str, os.PathLike)):
            weights: Sequence[PickedWeights] = ()
            # Before this process claims the run, so that weights that do not fit change nothing.
            with contextlib.suppress(CorruptError):  # Then the next line falls back to another one, or raises.
                weights = self._picked_of(record, strict=strict)
            found, _ = saver.session.locate(which, contents="any") or (None, "")
            if found is not None and found.is_adopted and (not weights or found.token != record.token):
                weights = self._picked_of(found, strict=strict)
        else:
            with self._training.reading():
                restored = saver.restore(which, contents="any")
            found = restored.record if restored is not None else None
            if restored is not None and restored.record.is_adopted:
                weights = self._picked(restored.state, restored.record.name, Opener(), strict=strict)
        if found is None or not found.is_adopted:
            return False
        self._go_on_at(found, weights)
        return True

    def _picked_of(self, record: Record, *, strict: bool) -> Sequence[PickedWeights]:
        path = f"{os.fspath(self._directory).rstrip('/')}/{record.name}"
        options = self._options
        opener = Opener(trust=options.get("trust"), storage_options=options.get("storage_options"))
        return self._picked(path, path, opener, strict=strict)

    def _picked(self, source: Any, where: str, opener: Opener, *, strict: bool) -> Sequence[PickedWeights]:
        """Read the weights of every module, before any is loaded."""
        modules = self._training.objects.modules
        try:
            return [
                picked_weights(module, source, opener, part=name if len(modules) > 1 else None, strict=strict)
                for name, module in modules.items()
            ]
        except MismatchError as error:
            keys = ", ".join(f"{name!r}: KEY" for name in self._training.objects.shared)
            msg = (
                f"{error}. In a Loop give the path, and where each state is in it: resume({shown_place(where)!r}, "
                f"map={{{keys}}}); step and epoch are those of its record"
            )
            raise MismatchError(msg) from error

    def _go_on_at(self, record: Record, weights: Sequence[PickedWeights]) -> None:
        training = self._training
        for one in weights:
            one.put()
        training.position.begin_at(record)
        modules = training.objects.modules
        others = [name for name in training.objects.names if name not in modules]
        anew = f". These begin anew: {', '.join(others)}; map= can name their places in the file" if others else ""
        msg = (
            f"{record.name} was adopted, so another program wrote it. The weights of {', '.join(modules)} and the step "
            f"{record.step} of its record were loaded. The training begins with epoch {training.position.epoch}{anew}"
        )
        warn(msg)


def _warn_of(differences: Differences, source: str) -> None:
    if differences:
        untaken = f"; not loaded at all: {', '.join(differences.untaken)}" if differences.untaken else ""
        msg = f"{source} does not fit, so only a part was loaded: {differences}{untaken}"
        warn(msg)
