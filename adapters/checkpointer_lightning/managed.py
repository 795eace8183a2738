"""A checkpoint callback whose decisions are a manager's: hooks become observations, decisions become saves."""

from __future__ import annotations

import math
import weakref
from typing import Any, Literal

from checkpointer import CheckpointManager, Progress
from checkpointer.ranks import on_rank_zero
from checkpointer.triggers import Horizon
from checkpointer_lightning import siblings
from checkpointer_lightning.dumping import desk_of
from checkpointer_lightning.finding import forget_copy
from checkpointer_lightning.rescuing import rescue, rescue_together
from checkpointer_lightning.saving import Answer, Saving, Training
from checkpointer_lightning.signalling import signals_of
from checkpointer_lightning.talking import close_ranks, open_ranks
from checkpointer_lightning.writing import Pen

__all__ = ["Managed", "Moment"]

Moment = Literal["batch", "validation", "epoch", "end", "asked"]
"""What has just come to its end: a training batch, a validation, an epoch, the training; or somebody asks."""


class Managed(Saving):
    """Base of both callbacks; a subclass says which policy, and which moments are reported."""

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

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the directory, and go on with the run that was restored."""
        if trainer.fast_dev_run:
            return
        number = self._number(trainer)
        policy = siblings.apart(self._make_policy(), number)
        ranks = open_ranks(trainer)
        weights_only = policy.contents == "weights"
        pen = Pen.of(trainer, self._package, ranks, lambda: self._dump(trainer), weights_only=weights_only)
        again = self._last_trainer is not None and self._last_trainer() is trainer
        self._last_trainer = weakref.ref(trainer)
        manager: CheckpointManager | None = None
        options = {**self._options, **pen.how}

        def open_it() -> Horizon:
            nonlocal manager
            label = siblings.label(number)
            manager = CheckpointManager(self._folder, policy, label=label, clock=self._clock, **options)
            self._go_on(trainer, manager, policy, again=again)
            return manager.horizon

        try:
            training = Training(pen, ranks, None, on_rank_zero(ranks, open_it))
        except BaseException:
            if manager is not None:
                manager.close()
            close_ranks(ranks)
            raise
        forget_copy(self._found)
        training.manager, training.rescues = manager, policy.rescue
        self._training = training
        if ranks.size > 1:
            signals_of(trainer).listen(trainer)
        self._show(on_rank_zero(ranks, lambda: self._account(training, None)))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """See `Callback.teardown`: close the directory."""
        super().teardown(trainer, pl_module, stage)
        self._close(trainer)

    def _close(self, trainer: Any) -> None:
        desk_of(trainer).clear()
        signals_of(trainer).leave()
        training = self._training
        if training is None:
            return
        self._saved, self._training = self._manager_state(), None
        try:
            if training.manager is not None:
                training.manager.close()
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

    def _end_batch_together(self, trainer: Any, training: Training) -> None:
        """Do the same on all ranks: steps and epochs they all know, of a time or a signal they have to be told."""
        signals, horizon = signals_of(trainer), training.horizon
        reports = self._reports("batch", trainer)
        late = reports and training.ranks.rank == 0 and self._clock.time() >= horizon.time
        stops = signals.noted
        if training.agreement(late or stops):
            late, stops = map(bool, training.ranks.highest(float(late), float(stops)))
        else:
            late = stops = False
        known = Progress(step=trainer.global_step, epochs=trainer.current_epoch, time=-math.inf)
        if reports and (late or not horizon.covers(known)):
            self._report("batch", trainer)
        if stops or signals.agreed:
            if training.rescues and trainer.global_step:
                rescue_together(self, training, trainer, "SIGTERM")
            signals.stop(trainer)

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
            if not signals_of(trainer).agreed:  # Then it is saved already.
                rescue(self, self._training, trainer, exception)
        finally:
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
        step, epoch = trainer.global_step, trainer.current_epoch
        ends = self._ends_epoch(moment, trainer)
        now = Progress(step=step, epochs=epoch + ends, time=self._clock.time())
        if self._due(moment) or not training.horizon.covers(now):
            metrics = self._ask(moment, trainer, metrics)
        if moment == "epoch":
            training.epoch = step, epoch, ends
        elif moment == "end" and training.epoch[0] == step:
            # The Trainer counts on before the training ends.
            _, epoch, ends = training.epoch

        def decide() -> Answer:
            manager = training.managing
            decision = manager.decide(metrics, step, epoch, epoch_end=ends, due=self._due(moment))
            return Answer(decision, manager.horizon, self._account(training, decision))

        answer = on_rank_zero(training.ranks, decide)
        training.horizon = answer.horizon
        desk = desk_of(trainer)
        desk.turn_to((moment, step, epoch, trainer.fit_loop.epoch_loop.batch_progress.total.ready))
        training.moment = moment
        try:
            self._follow(trainer, answer.decision, answer.account)
        finally:
            training.moment = ""
            if self is siblings.newest(trainer.callbacks, Managed):
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
