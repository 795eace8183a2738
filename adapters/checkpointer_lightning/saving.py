"""From a decision to a checkpoint that is there, and to what the callback shows of it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any, Final

import attrs

from checkpointer import Attach, CheckpointManager, Decision, Save
from checkpointer.ports import Ranks
from checkpointer.ranks import Agreement
from checkpointer.triggers import Horizon
from checkpointer_lightning.dumping import desk_of
from checkpointer_lightning.identity import Identity
from checkpointer_lightning.measuring import Measured
from checkpointer_lightning.resuming import Resuming
from checkpointer_lightning.showing import Account, account_of
from checkpointer_lightning.writing import Pen

__all__ = ["Answer", "Saving", "Training"]


@attrs.frozen
class Answer:
    """What rank 0 tells the others."""

    decision: Decision
    horizon: Horizon
    account: Account


@attrs.define
class Training:
    """What lives from the start of a training to its end, on every rank."""

    pen: Pen
    ranks: Ranks
    manager: CheckpointManager | None
    """Rank 0's."""
    horizon: Horizon
    measured: Measured = attrs.field(factory=Measured)
    _agreement: Agreement | None = None
    epoch: tuple[int, int, bool] = (-1, -1, False)
    """The last report of an epoch: its step, its index, and whether it really ended."""
    moment: str = ""
    """What is being reported."""
    rescues: bool = False
    """Whether the policy saves when something ends the training."""

    @property
    def agreement(self) -> Agreement:
        """How the ranks hear of what has happened on one of them."""
        if self._agreement is None:
            self._agreement = Agreement(self.ranks)
        return self._agreement

    def lead(self, act: Callable[[CheckpointManager], Decision]) -> Decision:
        """Let rank 0's manager act, with the other ranks at its call; return on all what it returns."""
        done: Decision = self.pen.team.work(lambda: act(self.managing))
        return done

    @property
    def managing(self) -> CheckpointManager:
        """The manager, where there is one."""
        assert self.manager is not None, "rank 0 has one"
        return self.manager


class Saving(Resuming):
    """Carries decisions out."""

    _training: Training | None = None
    _pending: Save | None = None
    _last_trainer: weakref.ref[Any] | None = None

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
        decision = self._pending
        if decision is None or self._training is None:
            super()._save_checkpoint(trainer, filepath)
            return
        self._carry_out(trainer, lambda manager: manager.commit(decision))

    def _carry_out(self, trainer: Any, act: Callable[[CheckpointManager], Decision]) -> Decision:
        """Save on all ranks, and show and tell what was saved."""
        training = self._training
        assert training is not None, "it was asked"

        def lead() -> Answer:
            done = act(training.managing)
            return Answer(done, training.managing.horizon, self._account(training, None))

        answer: Answer = training.pen.team.work(lead)
        done: Decision = answer.decision
        training.horizon = answer.horizon
        self._show(answer.account)
        if not isinstance(done, Save):
            return done
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = os.path.join(self._folder, done.name)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(weakref.proxy(self))
        self._retired(trainer, done)
        return done

    @property
    def _at_batch(self) -> bool:
        """Whether what is saved now is saved at the end of a batch."""
        training = self._training
        return training is not None and training.moment == "batch"

    def _dump(self, trainer: Any) -> dict[str, Any]:
        """Return the state to save; every callback of this moment gets the same one."""
        saving = [callback for callback in trainer.callbacks if isinstance(callback, Identity)]
        return desk_of(trainer).dump(trainer, saving, weights_only=self.save_weights_only)

    def _retired(self, trainer: Any, decision: Save | Attach) -> None:
        for name in decision.retire:
            self._remove_checkpoint(trainer, os.path.join(self._folder, name))

    def _remove_checkpoint(self, trainer: Any, filepath: str) -> None:
        """Do nothing: the manager has removed the file. A subclass may remove here what it has put beside it."""

    def _account(self, training: Training, decision: Decision | None) -> Account:
        manager = training.managing
        manifest = manager.manifest if decision is None else manager.after(decision)
        return account_of(manager.policy, manifest, self._folder, self.save_top_k)

    def _show(self, account: Account) -> None:
        account.show(self)

    def _manager_state(self) -> dict[str, Any]:
        training = self._training
        if training is None or training.manager is None:
            return dict(self._saved)
        state = training.manager.state_dict()
        # Whoever saves this, the training is at this step: what is saved of it by others is no other timeline.
        return {**state, "step": max(state["step"], training.pen.trainer.global_step)}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _OF_A_TRAINING}


_OF_A_TRAINING: Final = ("_training", "_last_trainer", "log", "log_dict")
"""Names of what a copy does not take along. The Trainer lends a callback the methods with which its module logs."""
_SHOWN: Final = (
    "best_model_path",
    "best_model_score",
    "best_k_models",
    "kth_best_model_path",
    "kth_value",
    "last_model_path",
    "current_score",
)
"""Names of what `Account.show` sets."""
