"""A checkpoint callback that holds the session of a training: Lightning's hooks become its reports."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final

from checkpointer import Decision, Policy
from checkpointer._secrets import shown_place
from checkpointer.clock import SystemClock
from checkpointer.distributed.ranks import Agreement, on_rank_zero
from checkpointer.errors import failures_as_warnings, warn
from checkpointer.policy.swapped_weights import marked
from checkpointer.ports import Clock
from checkpointer.save.background import Busy
from checkpointer_lightning import several_callbacks
from checkpointer_lightning.attributes import NAMES, Attributes
from checkpointer_lightning.packages import Package
from checkpointer_lightning.rescue import rescue, stop
from checkpointer_lightning.resume import Resume, find_valid, remove_copies
from checkpointer_lightning.session import Moment, TrainingSession
from checkpointer_lightning.signals import batches_per_loader, signals_of
from checkpointer_lightning.trainer_io import cache_of

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import ModelCheckpoint as Base
else:
    Base = object

_STATE: Final = "checkpointer"
"""Key of the manager's state in the callback's."""
_PATHS: Final = ("dirpath", "best_model_path", "kth_best_model_path", "last_model_path")
_OF_A_TRAINING: Final = ("_session", "_last_trainer", "log", "log_dict")
"""Attributes that a copy leaves out. The Trainer gives a callback the ``log`` methods of its module."""


class CallbackBase(Base):
    """Base of both callbacks. A subclass has the policy, and says which moments are reported."""

    _package: ClassVar[Package]
    _base_key: Any
    """A property: the state key, without the number that distinguishes equal ones."""
    _make_policy: Callable[[], Policy]
    _reports: Callable[[Moment, Any], bool]
    """Returns whether a moment is an observation."""
    _ends_epoch: Callable[[Moment, Any], bool]
    _due: Callable[[Moment], str]
    """Returns why a save is due whatever the trigger says; empty if the trigger decides."""
    _clock: Clock = SystemClock()
    _options: Mapping[str, Any] = {}
    """Further arguments of the manager."""
    _background: Busy | None = None
    """As for `CheckpointManager`."""
    _grace_s: float = math.inf
    """Seconds between a signal to stop and the kill that follows it."""
    _session: TrainingSession | None = None
    _last_trainer: weakref.ref[Any] | None = None
    _key_index: int | None = None
    _stage: str = ""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._resume = Resume()
        several_callbacks.CALLBACKS[id(self)] = self

    def _ask(self, moment: Moment, trainer: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        """Return the metrics to decide by, when something may be due."""
        return metrics

    def _log_decision(self, trainer: Any, decision: Decision, attributes: Attributes) -> None:
        """Log a decision before it is carried out; ``attributes`` are those after it."""

    # Identity and directory

    @property  # type: ignore[misc]
    def __class__(self) -> type[Any]:
        """The class. The Trainer of the other package reads it, and gets an error with the right import."""
        self._package.refuse_caller(type(self).__name__)
        return type(self)

    @property
    def state_key(self) -> str:
        """Key of the callback's state in a checkpoint: distinct among the callbacks of a Trainer."""
        index = several_callbacks.key_index(self) if self._key_index is None else self._key_index
        return f"{self._base_key}#{index + 1}" if index else self._base_key

    @property
    def _folder(self) -> str:
        return os.fspath(self.dirpath or "")

    def _resolve_folder(self, trainer: Any) -> str:
        return str(self._ModelCheckpoint__resolve_ckpt_dir(trainer))  # Before `setup` ``dirpath`` may be None.

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _OF_A_TRAINING}

    # Start and end

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """See `Callback.setup`: find the directory. The loaders of a training are not made yet."""
        self._package.refuse_trainer(trainer, type(self).__name__)
        self._set_up_directory(trainer, pl_module, stage)
        self._key_index = several_callbacks.key_index(self, trainer.callbacks)
        self._stage = stage
        self._resume = Resume(state=self._resume.state, found=self._resume.found)
        if stage == "fit":
            signals_of(trainer).cover(trainer)

    def _set_up_directory(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the directory, and continue the run that was loaded."""
        if trainer.fast_dev_run:
            return
        remove_copies(self._resume.found, trainer.ckpt_path)
        session = TrainingSession(self, trainer)
        self._last_trainer = weakref.ref(trainer)
        session.signals.listen(trainer, several_ranks=session.ranks.size > 1)
        self._session = session
        self.__dict__.update(self._resume.attributes)  # From here on the attributes follow the records.
        on_rank_zero(session.ranks, session.attributes).set_on(self)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """See `Callback.teardown`: close the directory."""
        super().teardown(trainer, pl_module, stage)
        remove_copies(self._resume.found, trainer.ckpt_path)
        self._close(trainer)

    def _close(self, trainer: Any) -> None:
        cache_of(trainer).begin(None)
        session = self._session
        if session is not None:
            self._resume.state, self._session = self._manager_state(), None
            session.close()

    # Hooks

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Report a batch; costs a comparison unless something is due."""
        session = self._session
        if session is None:
            return
        reports, collects, requeues, stops = session.agree(reports=self._reports("batch", trainer))
        if reports:
            session.report("batch")
        if collects:
            session.collect()
        if requeues:
            self._requeue(session)
        if stops:
            stop(session)

    def _requeue(self, session: TrainingSession) -> None:
        """Let Lightning save for SLURM and requeue the job, as it does within its signal handler."""
        with self._package.in_foreground(session.trainer.strategy):
            session.signals.pass_on()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """See `Callback.on_validation_start`: several ranks check whether they can stop within this validation."""
        session = self._session
        if session is not None:
            session.is_validating = True
        if session is None or session.ranks.size == 1 or not session.is_last:
            return
        batches = session.ranks.gather(batches_per_loader(trainer))
        # If the numbers differ, a rank would wait in Lightning's collectives for a rank that has stopped.
        is_equal = None not in batches and all(each == batches[0] for each in batches)
        session.validation_agreement = Agreement(session.ranks) if is_equal else None

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """Stop several ranks after a batch, as Lightning stops one; `on_validation_end` does it after the last."""
        session = self._session
        is_last_batch = trainer.fit_loop.epoch_loop.val_loop.batch_progress.is_last_batch
        if session is None or session.validation_agreement is None or is_last_batch:
            return
        if session.validation_agreement(session.signals.noted):
            stop(session)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Report a validation: its metrics are attached to the step's checkpoint, or decide on one."""
        session = self._session
        if session is None or trainer.sanity_checking:
            return
        session.is_validating = False
        session.report("validation")
        if session.ranks.size > 1 and session.is_last:
            session.validation_agreement = None
            if any(session.ranks.highest(float(session.signals.noted))):
                stop(session)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Report the end of an epoch."""
        if self._session is not None:
            self._session.report("epoch")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Report the end of the training, and wait for what is being written."""
        session = self._session
        if session is None:
            return
        session.collect(waits=True)
        if self._due("end"):
            session.report("end")
            session.collect(waits=True)
        can_requeue = session.signals.awaits_requeue and session.is_last
        if can_requeue and any(session.ranks.highest(float(session.signals.requeue))):
            self._requeue(session)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Save the state, if the policy rescues; never in a way that could hide the exception."""
        session = self._session
        if session is None:
            return
        signals = session.signals
        try:
            # After an agreed SIGTERM the state is saved already. A requeued job continues from Lightning's file.
            is_sigterm = type(exception).__name__ == "SIGTERMException"
            if is_sigterm:
                session.grace.begin()
            if not signals.agreed and not (is_sigterm and signals.requeued):
                rescue(session, exception)
            if signals.requeue:
                signals.requeue = False
                warn(_NO_REQUEUE)
            with failures_as_warnings():
                session.collect(waits=True, is_alone=True)
        finally:
            with failures_as_warnings():
                self._close(trainer)

    # Files

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        """Carry out a decision. A subclass may wrap it: after it returns, the file exists and is whole.

        In the background the file exists later. Until then the attributes name only files that exist.
        """
        session = self._session
        if session is None or session.pending is None:
            super()._save_checkpoint(trainer, filepath)
            return
        decision = marked(session.pending, trainer.optimizers)
        if session.ranks.size == 1:
            session.committed(session.managing.session.commit(decision))
        else:  # Only rank 0 has a manager.
            session.committed(session.io.team.work(lambda: session.managing.session.commit(decision)))

    def _remove_checkpoint(self, trainer: Any, filepath: str) -> None:
        """Do nothing: the manager has removed the file. A subclass may remove here what it has put beside it."""

    def _dump(self, trainer: Any) -> dict[str, Any]:
        """Return the state to save; all callbacks that save at this moment get the same dump."""
        callbacks = several_callbacks.ours(trainer.callbacks)
        dump = cache_of(trainer).dump(trainer, callbacks, weights_only=self.save_weights_only)
        return _with_validation_at_start(dump) if self._session is not None and self._session.is_validating else dump

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return what Lightning's callback does, and the manager's state, so that a resume is a restore."""
        with contextlib.nullcontext() if self._session is None else self._session.outlook():
            state = _with_paths(super().state_dict(), shown_place)  # It goes into the payload.
            return {**state, _STATE: dict(self._manager_state())}

    def _manager_state(self) -> Mapping[str, Any]:
        session = self._session
        if session is None or session.manager is None:
            return self._resume.state
        state = session.manager.session.state_dict()
        # Another callback may save this. The training is at this step, so later saves are on the same timeline.
        return {**state, "step": max(state["step"], session.trainer.global_step)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` returned, or what Lightning's callback did."""
        resume, state = self._resume, _with_paths(state_dict, self._as_given)
        ours = state.pop(_STATE, {})
        if not ours:
            super().load_state_dict(state)
            best = state.get("best_model_path")
            newest = {best: None} if best else {}
            resume.scores = dict(self.best_k_models or newest) if self._stage == "fit" else {}
            return
        self.best_model_path = state["best_model_path"]
        if state["dirpath"] == self.dirpath:
            # These count until the records are read. A validation reads none, nor does a training that has ended.
            resume.attributes = {name: vars(self)[name] for name in NAMES if name != "best_model_path"}
            self.__dict__.update({name: state[name] for name in NAMES})
        resume.state, resume.is_loaded = ours, self._stage == "fit"

    def _as_given(self, path: str) -> str:
        """Return a path that `state_dict` has written, with the user and password that the directory has here."""
        folder, shown = self._folder, shown_place(self._folder)
        return folder + path[len(shown) :] if path == shown or path.startswith(f"{shown}/") else path

    @property
    def best_model_path(self) -> str:
        """Path or URL of the best checkpoint; empty if none is known.

        If the callback has saved nothing, a Trainer that resolves ``ckpt_path="best"`` gets it from the records.
        """
        known: str = vars(self)["best_model_path"]
        # Before a training is set up, only the object that reads it knows the Trainer of the callback.
        connector: Any = None if known else sys._getframe(1).f_locals.get("self")
        if type(connector).__name__ == "_CheckpointConnector":
            known = self.best_model_path = find_valid("best", self, connector.trainer) or ""
        return known

    @best_model_path.setter
    def best_model_path(self, path: str) -> None:
        self.__dict__["best_model_path"] = path

    def _find_last_checkpoints(self, trainer: Any) -> set[str]:
        """Return what ``ckpt_path="last"`` means here: the newest checkpoint that is whole."""
        self._resume.found = found = find_valid("last", self, trainer)
        return {found} if found else super()._find_last_checkpoints(trainer)


def _with_paths(state: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """Return a callback's state with each path changed."""
    state = {key: change(value) if key in _PATHS and isinstance(value, str) else value for key, value in state.items()}
    ranked = state.get("best_k_models")
    if isinstance(ranked, dict):
        state["best_k_models"] = {change(path): score for path, score in ranked.items()}
    return state


def _with_validation_at_start(dump: dict[str, Any]) -> dict[str, Any]:
    """Return the dump with the running validation at its first batch, so that a resume runs all of it.

    Else Lightning would skip the validation, or run as many batches as were left and log the metrics of those.
    """
    loops = dump.get("loops", {})
    key, fit_loop = "epoch_loop.val_loop.batch_progress", loops.get("fit_loop", {})
    if key not in fit_loop:
        return dump
    before = {"total": fit_loop[key]["total"]["ready"] - fit_loop[key]["current"]["ready"], "current": 0}
    counts = {k: {"ready": n + 1, "started": n + 1, "processed": n, "completed": n} for k, n in before.items()}
    return {**dump, "loops": {**loops, "fit_loop": {**fit_loop, key: {**counts, "is_last_batch": False}}}}


_NO_REQUEUE: Final = (
    "SLURM asked for the job to be run again, and an exception ended the training before the end of the batch: "
    "Lightning's checkpoint for that was not saved, and the job not requeued"
)
