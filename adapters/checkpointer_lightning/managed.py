"""A checkpoint callback whose decisions are a manager's: hooks become observations, decisions become saves."""

from __future__ import annotations

import math
import os
import warnings
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import attrs

from checkpointer import Attach, CheckpointerWarning, CheckpointManager, Decision, Policy, Progress, Save
from checkpointer.clock import SystemClock
from checkpointer.naming import fixed_parts
from checkpointer.ports import Clock
from checkpointer.triggers import Horizon
from checkpointer_lightning import siblings
from checkpointer_lightning.adopting import adopt
from checkpointer_lightning.finding import newest_valid
from checkpointer_lightning.measuring import Measured
from checkpointer_lightning.packages import Package
from checkpointer_lightning.showing import Account, account_of
from checkpointer_lightning.writing import Pen, on_rank_zero

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import ModelCheckpoint as Base
else:
    Base = object

__all__ = ["Managed", "Moment"]

Moment = Literal["batch", "validation", "epoch", "end"]
"""What has just come to its end: a training batch, a validation, an epoch, the training."""

STATE = "checkpointer"
"""Where the manager's state lies in the callback's."""


@attrs.frozen
class _Answer:
    """What rank 0 tells the others."""

    decision: Decision
    horizon: Horizon
    account: Account


@attrs.define
class _Training:
    """What lives from the start of a training to its end, on every rank."""

    pen: Pen
    manager: CheckpointManager | None
    """Rank 0's."""
    horizon: Horizon
    measured: Measured = attrs.field(factory=Measured)
    epoch: tuple[int, int, bool] = (-1, -1, False)
    """The last report of an epoch: its step, its index, and whether it really ended."""


class Managed(Base):
    """Base of both callbacks; a subclass says which policy, and which moments are reported."""

    _package: ClassVar[Package]
    _clock: Clock = SystemClock()
    _training: _Training | None = None
    _pending: Save | None = None
    _place: int | None = None
    _stage: str = ""
    _saved: Mapping[str, Any] = {}
    """The manager's state as it was last."""
    _goes_on: bool = False
    """Whether `_saved` is what this training goes on from."""
    _theirs: Mapping[str, Any] = {}
    """Path and score of what Lightning's own class had saved, if this training goes on from there."""
    _found: str | None = None
    """What ``ckpt_path="last"`` was found to mean."""
    _last_trainer: weakref.ref[Any] | None = None

    # What a subclass says

    def _make_policy(self) -> Policy:
        raise NotImplementedError

    def _make_manager(self, policy: Policy, pen: Pen, label: str) -> CheckpointManager:
        return CheckpointManager(self._folder, policy, save=pen, label=label, clock=self._clock)

    def _reports(self, moment: Moment, trainer: Any) -> bool:
        """Return whether this moment is an observation."""
        raise NotImplementedError

    def _ends_epoch(self, moment: Moment, trainer: Any) -> bool:
        """Return whether it ends an epoch."""
        raise NotImplementedError

    def _due(self, moment: Moment) -> str:
        """Return why it is due whatever the trigger says; empty if the trigger is to say."""
        raise NotImplementedError

    @property
    def _base_key(self) -> str:
        raise NotImplementedError

    # Who we are

    @property
    def state_key(self) -> str:
        """Key of the callback's state in a checkpoint: distinct among the callbacks of a Trainer, whatever they are."""
        self._package.refuse_caller(type(self).__name__)
        key = self._base_key
        number = siblings.guess_place(self, key) if self._place is None else self._place
        return f"{key}#{number + 1}" if number else key

    @property
    def _folder(self) -> str:
        return os.fspath(self.dirpath or "")

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """See `Callback.setup`: find the directory."""
        self._package.refuse_trainer(trainer, type(self).__name__)
        super().setup(trainer, pl_module, stage)
        self._place = siblings.place(self, self._base_key, trainer.callbacks)
        self._stage, self._goes_on, self._theirs = stage, False, {}

    # From start to end

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the directory, and go on with the run that was restored."""
        if trainer.fast_dev_run:
            return
        number = self._number(trainer)
        policy = siblings.apart(self._make_policy(), number)
        pen = Pen(trainer, policy.contents == "weights", self._package.async_io)
        again = self._last_trainer is not None and self._last_trainer() is trainer
        self._last_trainer = weakref.ref(trainer)
        manager: CheckpointManager | None = None

        def open_it() -> Horizon:
            nonlocal manager
            manager = self._make_manager(policy, pen, siblings.label(number))
            if self._theirs:
                adopt(manager, self._folder, self._theirs, self.monitor)
            state = manager.state_dict() if self._theirs else self._saved if self._goes_on or again else None
            if state:
                manager.load_state_dict(state, source=self._resumed_name(trainer, policy, manager))
            return manager.horizon

        self._training = _Training(pen, None, on_rank_zero(trainer, open_it))
        self._training.manager = manager
        self._show(on_rank_zero(trainer, lambda: self._account(None)))

    def _number(self, trainer: Any) -> int:
        """Return how many callbacks of the Trainer come before this one in its directory."""
        same = [other for other in trainer.callbacks if isinstance(other, Managed) and other._folder == self._folder]
        return same.index(self) if self in same else 0

    def _find_last_checkpoints(self, trainer: Any) -> set[str]:
        """Return what ``ckpt_path="last"`` means here: the newest checkpoint that is whole."""
        folder = self._resolve_folder(trainer)
        number = self._number(trainer)
        naming = siblings.apart(self._make_policy(), number).name
        self._found = newest_valid(folder, naming, siblings.label(number))
        return {self._found} if self._found else super()._find_last_checkpoints(trainer)

    def _resolve_folder(self, trainer: Any) -> str:
        # Asked before `setup` has found the directory.
        return str(self._ModelCheckpoint__resolve_ckpt_dir(trainer))

    def _resumed_name(self, trainer: Any, policy: Policy, manager: CheckpointManager) -> str:
        """Return the name of the checkpoint that a person chose to resume from; empty if nobody did."""
        if not (self._goes_on or self._theirs) or trainer.ckpt_path in (None, "", self._found):
            return ""
        template = policy.name.template
        if template is not None and fixed_parts(template, policy.name.join) == template:
            return ""  # The name is that of the newest, or the best: what it names is replaced, as in Lightning.
        folder, name = os.path.split(os.path.abspath(trainer.ckpt_path))
        path = os.path.relpath(os.path.join(os.path.realpath(folder), name), os.path.realpath(self._folder))
        path = path.replace(os.sep, "/")
        return path if path in manager.manifest.by_name and path not in policy.aliases else ""

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """See `Callback.teardown`: close the directory."""
        super().teardown(trainer, pl_module, stage)
        self._close()

    def _close(self) -> None:
        training, self._training = self._training, None
        if training is not None and training.manager is not None:
            self._saved = training.manager.state_dict()
            training.manager.close()

    # Hooks

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Report a batch; costs a comparison unless something is due."""
        if self._training is None or not self._reports("batch", trainer):
            return
        now = Progress(step=trainer.global_step, epochs=trainer.current_epoch, time=self._clock.time())
        if not self._is_quiet(trainer, self._training.horizon, now):
            self._report("batch", trainer)

    def _is_quiet(self, trainer: Any, horizon: Horizon, now: Progress) -> bool:
        quiet = horizon.covers(now)
        if math.isinf(horizon.time) or trainer.world_size == 1:
            return quiet
        return bool(trainer.strategy.broadcast(quiet))  # Clocks differ: rank 0's counts.

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Report a validation: what it measured is attached to the step's checkpoint, or decides on one."""
        if self._training is not None and not trainer.sanity_checking:
            self._report("validation", trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Report the end of an epoch."""
        if self._training is not None:
            self._report("epoch", trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Report the end of the training."""
        if self._training is not None and self._due("end"):
            self._report("end", trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Save what there is, if the policy rescues; never in a way that could hide the exception."""
        if self._training is None:
            return
        try:
            self._rescue(trainer, exception)
        finally:
            self._close()

    def _rescue(self, trainer: Any, exception: BaseException) -> None:
        training = self._training
        assert training is not None, "it was asked"
        if training.manager is None or not training.manager.policy.rescue or not trainer.global_step:
            return
        if trainer.world_size > 1:
            # Saving needs every rank, and the others may be waiting elsewhere: the exception has to be seen instead.
            warnings.warn("no rescue checkpoint: one rank alone cannot save", CheckpointerWarning, stacklevel=3)
            return
        words = f"{type(exception).__name__}: {exception}"
        try:
            saved = training.manager.rescue(words, step=trainer.global_step, epoch=trainer.current_epoch)
        except Exception as failure:  # The error that ended the training is the one to be seen.
            msg = f"no rescue checkpoint could be written: {failure!r}"
            warnings.warn(msg, CheckpointerWarning, stacklevel=3)
            return
        if isinstance(saved, Save):
            path = os.path.join(self._folder, saved.name)
            self._package.info(
                f"An {type(exception).__name__} was raised with message: {exception}, saved checkpoint to {path}"
            )

    # Reporting

    def _report(self, moment: Moment, trainer: Any) -> None:
        training = self._training
        assert training is not None, "it was asked"
        if not trainer.global_step:  # Nothing was trained yet.
            return
        # Every rank looks, for a metric may be computed by all of them together.
        metrics = self._metrics(trainer, training.measured)
        if not self._reports(moment, trainer):
            return
        step, epoch = trainer.global_step, trainer.current_epoch
        ends = self._ends_epoch(moment, trainer)
        if moment == "epoch":
            training.epoch = step, epoch, ends
        elif moment == "end" and training.epoch[0] == step:
            # The Trainer counts on before the training ends.
            _, epoch, ends = training.epoch

        def decide() -> _Answer:
            manager = training.manager
            assert manager is not None, "rank 0 has one"
            decision = manager.decide(metrics, step, epoch, epoch_end=ends, due=self._due(moment))
            return _Answer(decision, manager.horizon, self._account(decision))

        answer = on_rank_zero(trainer, decide)
        training.horizon = answer.horizon
        self._follow(trainer, answer.decision, answer.account)

    def _metrics(self, trainer: Any, measured: Measured) -> dict[str, Any]:
        fresh = measured.at(trainer.global_step, trainer.callback_metrics)
        candidates = self._monitor_candidates(trainer)
        # What a subclass adds is its own affair; epoch and step are told apart from metrics of that name.
        added = candidates.keys() - trainer.callback_metrics.keys() - {"epoch", "step"}
        return {name: value for name, value in candidates.items() if name in fresh or name in added}

    def _follow(self, trainer: Any, decision: Decision, account: Account) -> None:
        if isinstance(decision, Attach):
            self._show(account)
            self._retired(trainer, decision)
        if not isinstance(decision, Save):
            return
        # Before the save, for what is shown is part of the state that is saved.
        before = dict(self.__dict__)
        self._show(account)
        self._pending = decision
        try:
            self._save_checkpoint(trainer, os.path.join(self._folder, decision.name))
        except BaseException:
            self.__dict__.update({name: before[name] for name in _SHOWN})
            raise
        finally:
            self._pending = None

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        """Carry out what was decided. A subclass may wrap it: once it returns, the file is there, whole."""
        decision, training = self._pending, self._training
        if decision is None or training is None:
            super()._save_checkpoint(trainer, filepath)
            return
        done = training.pen.commit(training.manager, decision)
        answer = on_rank_zero(trainer, lambda: _Answer(done, self._horizon(), self._account(None)))
        training.horizon = answer.horizon
        self._show(answer.account)
        if not isinstance(done, Save):
            return
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = os.path.join(self._folder, done.name)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(weakref.proxy(self))
        self._retired(trainer, done)

    def _horizon(self) -> Horizon:
        assert self._training is not None, "it was asked"
        assert self._training.manager is not None, "rank 0 has one"
        return self._training.manager.horizon

    def _retired(self, trainer: Any, decision: Save | Attach) -> None:
        for name in decision.retire:
            self._remove_checkpoint(trainer, os.path.join(self._folder, name))

    def _remove_checkpoint(self, trainer: Any, filepath: str) -> None:
        """Do nothing: the manager has removed the file. A subclass may remove here what it has put beside it."""

    def _account(self, decision: Decision | None) -> Account:
        manager = self._training.manager if self._training else None
        assert manager is not None, "rank 0 has one"
        manifest = manager.manifest if decision is None else manager.after(decision)
        return account_of(manager.policy, manifest, self._folder, self.save_top_k)

    def _show(self, account: Account) -> None:
        account.show(self)

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return what Lightning's callback does, and the manager's state: a resume is then a restore."""
        manager = self._training.manager if self._training else None
        return {**super().state_dict(), STATE: dict(manager.state_dict() if manager else self._saved)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` returned, or what Lightning's callback did."""
        state = dict(state_dict)
        ours = state.pop(STATE, {})
        if not ours:
            super().load_state_dict(state)
            best = state.get("best_model_path")
            newest = {best: None} if best else {}
            self._theirs = dict(self.best_k_models or newest) if self._stage == "fit" else {}
            return
        # The records say the rest, and a folder that was moved has them with it.
        self.best_model_path = state["best_model_path"]
        self._saved, self._goes_on = ours, self._stage == "fit"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_training", "_last_trainer")}


_SHOWN = (
    "best_model_path",
    "best_model_score",
    "best_k_models",
    "kth_best_model_path",
    "kth_value",
    "last_model_path",
    "current_score",
)
"""Names of what `Account.show` sets."""
