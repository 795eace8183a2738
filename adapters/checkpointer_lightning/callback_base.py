"""A checkpoint callback whose decisions are a manager's: hooks become observations, decisions become saves."""

from __future__ import annotations

import math
import warnings
import weakref
from typing import Any, Final, Literal

from checkpointer import CheckpointerWarning, CheckpointManager, Decision, Progress, Save, Skip
from checkpointer.distributed.ranks import Agreement, on_rank_zero
from checkpointer.hosts.grace import Grace
from checkpointer.policy.triggers import Horizon
from checkpointer.save.background import Busy
from checkpointer_lightning import siblings
from checkpointer_lightning.background_events import BackgroundEvents
from checkpointer_lightning.ranks import close_ranks, open_ranks
from checkpointer_lightning.rescue import quietly, rescue, rescue_together
from checkpointer_lightning.save import Broadcast, Saving, Training
from checkpointer_lightning.signals import Signals, plan_of, signals_of
from checkpointer_lightning.state_cache import cache_of
from checkpointer_lightning.trainer_io import TrainerIO, in_foreground

__all__ = ["CallbackBase", "Moment"]

Moment = Literal["batch", "validation", "epoch", "end", "asked"]
"""What has just come to its end: a training batch, a validation, an epoch, the training; or somebody asks."""


class CallbackBase(Saving):
    """Base of both callbacks; a subclass says which policy, and which moments are reported."""

    _background: Busy | None = None
    """As for `CheckpointManager`."""
    _grace_s: float = math.inf
    """Seconds between a signal to stop and the kill that follows it."""

    # What a subclass says

    def _reports(self, moment: Moment, trainer: Any) -> bool:
        """Return whether this moment is an observation."""
        raise NotImplementedError

    def _ends_epoch(self, moment: Moment, trainer: Any) -> bool:
        """Return whether it ends an epoch."""
        raise NotImplementedError

    def _due(self, moment: Moment) -> str:
        """Return why it is due whatever the trigger says; empty if the trigger is to say."""
        raise NotImplementedError

    # From start to end

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """See `Callback.setup`: the loaders of a training are not made yet."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            signals_of(trainer).cover(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the directory, and go on with the run that was restored."""
        if trainer.fast_dev_run:
            return
        number = self._number(trainer)
        policy = siblings.apart(self._make_policy(), number)
        ranks = open_ranks(trainer)
        weights_only = policy.contents == "weights"
        pen = TrainerIO.of(trainer, self._package, ranks, lambda: self._dump(trainer), weights_only=weights_only)
        again = self._last_trainer is not None and self._last_trainer() is trainer
        self._last_trainer = weakref.ref(trainer)
        manager: CheckpointManager | None = None
        how = pen.how(background=self._background)
        behind = BackgroundEvents() if how.get("background") else None
        listeners = (*self._options.get("listeners", ()), *((behind,) if behind is not None else ()))
        options = {**self._options, **how, "listeners": listeners}

        def open_it() -> Horizon:
            nonlocal manager
            label = siblings.label(number)
            manager = CheckpointManager(self._folder, policy, label=label, clock=self._clock, **options)
            self._go_on(trainer, manager, policy, again=again)
            return manager.session.horizon

        try:
            training = Training(pen, ranks, None, on_rank_zero(ranks, open_it))
        except BaseException:
            if manager is not None:
                manager.close()
            close_ranks(ranks)
            raise
        self._forget_copies(trainer)
        training.manager, training.rescues, training.behind = manager, policy.rescue, behind
        self._grace = Grace(self._grace_s)
        training.signals = signals_of(trainer)
        training.signals.listen(trainer, talks=ranks.size > 1)
        self._training = training
        self.__dict__.update(self._shown_before)  # From here on it is the records that count.
        self._show(on_rank_zero(ranks, lambda: self._account(training, None)))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """See `Callback.teardown`: close the directory."""
        super().teardown(trainer, pl_module, stage)
        self._forget_copies(trainer)
        self._close(trainer)

    def _close(self, trainer: Any) -> None:
        cache_of(trainer).clear()
        training = self._training
        if training is None:
            return
        self._saved, self._training = self._manager_state(), None
        try:
            if training.manager is not None:
                training.manager.close(timeout=self._grace.left)
        finally:
            close_ranks(training.ranks)

    # Hooks

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Report a batch; costs a comparison unless something is due."""
        training = self._training
        if training is None:
            return
        if training.ranks.size > 1:
            self._end_batch_together(trainer, training)
        elif self._reports("batch", trainer):
            now = Progress(step=trainer.global_step, epochs=trainer.current_epoch, time=self._clock.time())
            if not training.horizon.covers(now):
                self._report("batch", trainer)
        if training.ranks.size == 1:
            if training.behind is not None and training.behind.has_news(training.manager):
                self._catch_up(trainer)
            if training.signals.requeue and self is siblings.newest(trainer.callbacks, CallbackBase):
                self._requeue(trainer, training)

    def _end_batch_together(self, trainer: Any, training: Training) -> None:
        """Do the same on all ranks: steps and epochs they all know, of a time or a signal they have to be told."""
        signals, horizon, behind = training.signals, training.horizon, training.behind
        reports = self._reports("batch", trainer)
        late = reports and training.ranks.rank == 0 and self._clock.time() >= horizon.time
        news = behind is not None and behind.has_news(training.manager)
        # The last callback asks for all: by then the others have reported this batch.
        is_last = self is siblings.newest(trainer.callbacks, CallbackBase)
        stops = signals.noted and is_last
        requeues = signals.requeue and is_last
        if training.agreement(late or stops or news or requeues):
            flags = training.ranks.highest(float(late), float(stops), float(news), float(requeues))
            late, stops, news, requeues = map(bool, flags)
        else:
            late = stops = news = requeues = False
        known = Progress(step=trainer.global_step, epochs=trainer.current_epoch, time=-math.inf)
        if reports and (late or not horizon.covers(known)):
            self._report("batch", trainer)
        if news:
            self._catch_up(trainer)
        if requeues:
            self._requeue(trainer, training)
        if stops:
            self._stop(trainer, training.signals)

    def _stop(self, trainer: Any, signals: Signals) -> None:
        """Save on all ranks what each callback rescues, and let each rank raise Lightning's exception."""
        for callback in trainer.callbacks:
            training = callback._training if isinstance(callback, CallbackBase) else None
            if training is None:
                continue
            callback._grace.begin()
            if training.rescues and trainer.global_step and not signals.requeued:
                rescue_together(callback, training, trainer, "SIGTERM")
        signals.stop(trainer)

    def _requeue(self, trainer: Any, training: Training) -> None:
        """Let Lightning save for SLURM and ask for the job to be run again, as it does within its signal handler."""
        with in_foreground(trainer.strategy, self._package.async_io):
            training.signals.hand_on()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """See `Callback.on_validation_start`: several ranks find out whether they can stop within this validation."""
        training = self._training
        if training is None or training.ranks.size == 1 or self is not siblings.newest(trainer.callbacks, CallbackBase):
            return
        plans = training.ranks.gather(plan_of(trainer))
        # With other numbers of batches a rank would wait in Lightning's collectives for one that has stopped.
        is_equal = None not in plans and all(plan == plans[0] for plan in plans)
        training.validating = Agreement(training.ranks) if is_equal else None

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """Stop several ranks after one batch of a validation, as Lightning stops one; the last has `on_validation_end`.

        The rescue is of the step before the validation, and has none of its metrics.
        """
        training = self._training
        if training is None or training.validating is None or _is_last(trainer):
            return
        if training.validating(training.signals.noted):
            self._stop(trainer, training.signals)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Report a validation: what it measured is attached to the step's checkpoint, or decides on one."""
        training = self._training
        if training is None or trainer.sanity_checking:
            return
        self._report("validation", trainer)
        if training.ranks.size == 1 or self is not siblings.newest(trainer.callbacks, CallbackBase):
            return
        training.validating = None
        if any(training.ranks.highest(float(training.signals.noted))):
            self._stop(trainer, training.signals)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Report the end of an epoch."""
        if self._training is not None:
            self._report("epoch", trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Report the end of the training, and wait for what is being written."""
        training = self._training
        if training is None:
            return
        self._catch_up(trainer, waits=True)
        if self._due("end"):
            self._report("end", trainer)
            self._catch_up(trainer, waits=True)
        if training.signals.awaits_requeue and self is siblings.newest(trainer.callbacks, CallbackBase):
            (asked,) = training.ranks.highest(float(training.signals.requeue))
            if asked:
                self._requeue(trainer, training)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Save what there is, if the policy rescues; never in a way that could hide the exception."""
        if self._training is None:
            return
        signals = self._training.signals
        try:
            # After an agreed SIGTERM it is saved already; a job that SLURM runs again goes on from Lightning's file.
            stopped = type(exception).__name__ == "SIGTERMException"
            if stopped:
                self._grace.begin()
            if not signals.agreed and not (stopped and signals.requeued):
                rescue(self, self._training, trainer, exception)
            if signals.requeue:
                signals.requeue = False
                warnings.warn(_NO_REQUEUE, CheckpointerWarning, stacklevel=2)
            with quietly():
                self._catch_up(trainer, waits=True, is_alone=True)
        finally:
            with quietly():
                self._close(trainer)

    # Reporting

    def _report(self, moment: Moment, trainer: Any) -> None:
        training = self._training
        assert training is not None, "it was asked"
        if not trainer.global_step:  # Nothing was trained yet.
            return
        # Every rank looks, for a metric may be computed by all of them together.
        metrics = self._metrics(trainer, training, self._monitor_candidates(trainer))
        if not self._reports(moment, trainer):
            return
        self._catch_up(trainer)
        step, epoch = trainer.global_step, trainer.current_epoch
        if moment not in ("validation", "asked"):  # A validation measures anew.
            metrics = training.measured.as_ranked(step, metrics)
        ends = self._ends_epoch(moment, trainer)
        now = Progress(step=step, epochs=epoch + ends, time=self._clock.time())
        if self._due(moment) or not training.horizon.covers(now):
            metrics = self._ask(moment, trainer, metrics)
        if moment == "epoch":
            training.epoch = step, epoch, ends
        elif moment == "end" and training.epoch[0] == step:
            # The Trainer counts on before the training ends.
            _, epoch, ends = training.epoch

        def decide() -> Broadcast:
            manager = training.managing
            decision = manager.session.decide(metrics, step, epoch, epoch_end=ends, due=self._due(moment))
            # What is attached in the background is not there yet.
            shown = decision if training.behind is None or isinstance(decision, Save) else None
            return Broadcast(decision, manager.session.horizon, self._account(training, shown))

        answer = on_rank_zero(training.ranks, decide)
        training.horizon = answer.horizon
        if _is_ranked(answer.decision):
            training.measured.rank(step, metrics)
        desk = cache_of(trainer)
        desk.turn_to((moment, step, epoch, trainer.fit_loop.epoch_loop.batch_progress.total.ready))
        training.moment = moment
        try:
            self._follow(trainer, answer.decision, answer.account)
        finally:
            training.moment = ""
            if self is siblings.newest(trainer.callbacks, CallbackBase):
                desk.clear()

    def _ask(self, moment: Moment, trainer: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        """Return the metrics to decide by, now that something may be due."""
        return metrics

    def _metrics(self, trainer: Any, training: Training, candidates: dict[str, Any]) -> dict[str, Any]:
        """Return what was measured at this step."""
        fresh = training.measured.at(trainer.global_step, trainer.callback_metrics)
        # What a subclass adds is its own affair; epoch and step are told apart from metrics of that name.
        added = candidates.keys() - trainer.callback_metrics.keys() - {"epoch", "step"}
        return {name: value for name, value in candidates.items() if name in fresh or name in added}


def _is_last(trainer: Any) -> bool:
    """Return whether this is the last batch of the validation."""
    return bool(trainer.fit_loop.epoch_loop.val_loop.batch_progress.is_last_batch)


def _is_ranked(decision: Decision) -> bool:
    """Return whether the rules have looked at the step's metrics: a step that waits for one is not ranked yet."""
    return not isinstance(decision, Skip) or (decision.due and not decision.waiting)


_NO_REQUEUE: Final = (
    "SLURM asked for the job to be run again, and an exception ended the training before the end of the batch: "
    "Lightning's checkpoint for that was not saved, and the job not requeued"
)
