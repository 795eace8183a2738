"""From a decision to a checkpoint that is there, and to what the callback shows of it."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import attrs

from checkpointer import Attach, CheckpointManager, Decision, Save, Skip
from checkpointer.distributed.ranks import Agreement, on_rank_zero
from checkpointer.hosts.grace import Grace
from checkpointer.policy.swapped_weights import marked
from checkpointer.policy.triggers import Horizon
from checkpointer.ports import Ranks
from checkpointer_lightning.attributes import ShownState, account_of
from checkpointer_lightning.background_events import BackgroundEvents, News
from checkpointer_lightning.fresh_metrics import Measured
from checkpointer_lightning.identity import Identity
from checkpointer_lightning.resume import SHOWN, Resuming
from checkpointer_lightning.signals import Signals
from checkpointer_lightning.state_cache import cache_of
from checkpointer_lightning.trainer_io import TrainerIO

__all__ = ["Broadcast", "Saving", "Training"]


@attrs.frozen
class Broadcast:
    """What rank 0 tells the others."""

    decision: Decision
    horizon: Horizon
    account: ShownState


@attrs.define
class Training:
    """What lives from the start of a training to its end, on every rank."""

    pen: TrainerIO
    ranks: Ranks
    manager: CheckpointManager | None
    """Rank 0's."""
    horizon: Horizon
    measured: Measured = attrs.field(factory=Measured)
    _agreement: Agreement | None = None
    validating: Agreement | None = None
    """How the ranks agree to stop within the validation that is running; None if they wait for its end."""
    epoch: tuple[int, int, bool] = (-1, -1, False)
    """The last report of an epoch: its step, its index, and whether it really ended."""
    moment: str = ""
    """What is being reported."""
    rescues: bool = False
    """Whether the policy saves when something ends the training."""
    behind: BackgroundEvents | None = None
    """What is under way, where the manager writes in the background."""
    signals: Signals = attrs.field(factory=Signals)
    """What the processes have been told."""

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
    _grace: Grace
    """Seconds that are left after a SIGTERM; made when a training begins."""
    _pending: Save | None = None
    _before: Mapping[str, Any] = {}
    """What was shown before the save that is being made."""
    _last_trainer: weakref.ref[Any] | None = None

    def _follow(self, trainer: Any, decision: Decision, account: ShownState) -> None:
        training = self._training
        behind = training.behind if training is not None else None
        if isinstance(decision, Attach):
            self._show(account)
            if behind is not None:
                behind.is_busy = True
            else:
                self._retired(trainer, decision.retire)
        if not isinstance(decision, Save):
            return
        if behind is not None:
            self._catch_up(trainer, waits=True)
        # Before the save, for what is shown is part of the state that is saved.
        self._before = {name: self.__dict__[name] for name in SHOWN}
        self._show(account)
        self._pending = decision
        try:
            self._save_checkpoint(trainer, os.path.join(self._folder, decision.name))
        except BaseException:
            self.__dict__.update(self._before)
            raise
        finally:
            self._pending, self._before = None, {}

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        """Carry out what was decided. A subclass may wrap it: once it returns, the file is there, whole.

        In the background it is there later, and what is shown until then is what is there.
        """
        decision = self._pending
        if decision is None or self._training is None:
            super()._save_checkpoint(trainer, filepath)
            return
        decision = marked(decision, trainer.optimizers)
        self._carry_out(trainer, lambda manager: manager.session.commit(decision))

    def _carry_out(self, trainer: Any, act: Callable[[CheckpointManager], Decision]) -> Decision:
        """Save on all ranks, and show and tell what was saved."""
        training = self._training
        assert training is not None, "it was asked"

        def lead() -> Broadcast:
            done = act(training.managing)
            return Broadcast(done, training.managing.session.horizon, self._account(training, None))

        answer: Broadcast = training.pen.team.work(lead)
        done: Decision = answer.decision
        training.horizon = answer.horizon
        self.__dict__.update(self._before)
        self._show(answer.account)
        if not isinstance(done, Save):
            return done
        self._last_global_step_saved = trainer.global_step
        if training.behind is not None:
            training.behind.is_busy = True
        else:
            self._tell(trainer, done.name)
            self._retired(trainer, done.retire)
        return done

    def _tell(self, trainer: Any, name: str) -> None:
        """Say that a checkpoint is there."""
        self._last_checkpoint_saved = os.path.join(self._folder, name)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(weakref.proxy(self))

    def _catch_up(self, trainer: Any, *, waits: bool = False, is_alone: bool = False) -> None:
        """Show and tell what has come to its end in the background, on all ranks.

        Args:
            trainer: Whose training it is.
            waits: Whether to wait until nothing is under way.
            is_alone: Whether the other ranks are not to be called: rank 0 does it for itself.

        Raises:
            SaveError: If what was under way has failed.
        """
        training = self._training
        behind = training.behind if training is not None else None
        if training is None or behind is None or not behind.is_busy:
            return

        def look() -> News:
            manager = training.managing
            if waits:
                behind.wait(manager, trainer.global_step, self._grace.left)
            is_idle = manager.wait(0)
            saved, retired = behind.take()
            return News(saved, retired, is_idle, self._account(training, None))

        if is_alone and training.ranks.rank:
            return
        news = look() if is_alone else on_rank_zero(training.ranks, look)
        behind.is_busy = not news.is_idle
        self._show(news.account)
        for name in news.saved:
            self._tell(trainer, name)
        self._retired(trainer, news.retired)

    def state_dict(self) -> dict[str, Any]:
        """Return what is to be kept; what is under way is in it as if it were done, for the state is read later."""
        training = self._training
        if training is None or training.behind is None or training.manager is None or self._pending is not None:
            return super().state_dict()
        with self._foreseeing(training):
            return super().state_dict()

    @contextlib.contextmanager
    def _foreseeing(self, training: Training) -> Iterator[None]:
        before = {name: self.__dict__[name] for name in SHOWN}
        self._show(self._account(training, _NOTHING))
        try:
            yield
        finally:
            self.__dict__.update(before)

    @property
    def _at_batch(self) -> bool:
        """Whether what is saved now is saved at the end of a batch."""
        training = self._training
        return training is not None and training.moment == "batch"

    def _dump(self, trainer: Any) -> dict[str, Any]:
        """Return the state to save; every callback of this moment gets the same one."""
        saving = [callback for callback in trainer.callbacks if isinstance(callback, Identity)]
        return cache_of(trainer).dump(trainer, saving, weights_only=self.save_weights_only)

    def _retired(self, trainer: Any, names: Iterable[str]) -> None:
        for name in names:
            self._remove_checkpoint(trainer, os.path.join(self._folder, name))

    def _remove_checkpoint(self, trainer: Any, filepath: str) -> None:
        """Do nothing: the manager has removed the file. A subclass may remove here what it has put beside it."""

    def _account(self, training: Training, decision: Decision | None) -> ShownState:
        """Return what there is; or, with a decision, what there will be once it is carried out."""
        manager = training.managing
        manifest = manager.session.manifest if decision is None else manager.session.after(decision)
        going = {record.name for record in manifest.aside}
        if decision is None and training.behind is not None:
            going |= {record.name for record in manifest.history} - manager.session.after(_NOTHING).by_name.keys()
        return account_of(manager.policy, manifest, self._folder, self.save_top_k, going)

    def _show(self, account: ShownState) -> None:
        account.show(self)

    def _manager_state(self) -> dict[str, Any]:
        training = self._training
        if training is None or training.manager is None:
            return dict(self._saved)
        state = training.manager.session.state_dict()
        # Whoever saves this, the training is at this step: what is saved of it by others is no other timeline.
        return {**state, "step": max(state["step"], training.pen.trainer.global_step)}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _OF_A_TRAINING}


_NOTHING: Final = Skip(reason="nothing is decided")
_OF_A_TRAINING: Final = ("_training", "_last_trainer", "log", "log_dict")
"""Names of what a copy does not take along. The Trainer lends a callback the methods with which its module logs."""
