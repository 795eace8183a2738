"""One training on one rank: rank 0's manager decides, all ranks save, and the attributes follow the records."""

from __future__ import annotations

import contextlib
import functools
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, Literal

from checkpointer import Attach, CheckpointManager, Decision, Save, Skip
from checkpointer.distributed.ranks import Agreement, TorchRanks, on_rank_zero
from checkpointer.hosts.grace import Grace
from checkpointer.policy.triggers import Horizon
from checkpointer_lightning.attributes import NAMES, Attributes, attributes_of
from checkpointer_lightning.background_events import BackgroundEvents
from checkpointer_lightning.fresh_metrics import FreshMetrics
from checkpointer_lightning.several_callbacks import ours, policy_and_label
from checkpointer_lightning.signals import signals_of
from checkpointer_lightning.trainer_io import TrainerIO, cache_of
from checkpointer_lightning.trainer_ranks import open_ranks

Moment = Literal["batch", "validation", "epoch", "end", "asked"]
"""What has just ended: a training batch, a validation, an epoch, the training; or user code asks for a save."""

_NOTHING: Final = Skip(reason="nothing is decided")


class TrainingSession:
    """Exists from the start of a training to its end. It opens the directory, and continues the run that was loaded."""

    def __init__(self, callback: Any, trainer: Any) -> None:
        self.callback, self.trainer = callback, trainer
        policy, label = policy_and_label(callback, trainer)
        self._rescues = policy.rescue
        self.ranks = open_ranks(trainer)
        self.agreement = Agreement(self.ranks)
        """Reports to all ranks what has happened on one of them."""
        self.validation_agreement: Agreement | None = None
        """How the ranks agree to stop within the running validation; None if they wait for its end."""
        dump, weights_only = functools.partial(callback._dump, trainer), policy.contents == "weights"
        self.io = TrainerIO(trainer, callback._package, self.ranks, dump, weights_only)
        self.signals = signals_of(trainer)
        self.grace = Grace(callback._grace_s)
        """Seconds that are left after a SIGTERM."""
        self.moment: Moment | None = None
        """What is being reported."""
        self.is_validating = False
        """Whether a validation has begun and not ended."""
        self.pending: Save | None = None
        """The decision that `_save_checkpoint` carries out."""
        self._before: Mapping[str, Any] = {}
        """The attributes before the pending save."""
        self._metrics = FreshMetrics()
        self._last_epoch = -1, -1, False
        """The last report of an epoch: its step, its index, and whether the epoch was complete."""
        options = {**callback._options, **self.io.manager_options(callback._background)}
        self.background = BackgroundEvents() if options.get("background") else None
        """Set if the manager writes in the background."""
        if self.background is not None:
            options["listeners"] = (*options.get("listeners", ()), self.background)
        self.manager: CheckpointManager | None = None
        """Only rank 0 has one."""

        def open_manager() -> Horizon:
            self.manager = manager = CheckpointManager(
                callback._folder, policy, label=label, clock=callback._clock, **options
            )
            callback._resume.apply(manager, policy, callback, trainer)
            return manager.session.horizon

        try:
            self.horizon = on_rank_zero(self.ranks, open_manager)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the directory, within the seconds that are left."""
        try:
            if self.manager is not None:
                self.manager.close(timeout=self.grace.left)
        finally:
            if isinstance(self.ranks, TorchRanks):
                self.ranks.close()

    @property
    def managing(self) -> CheckpointManager:
        """The manager, on rank 0."""
        assert self.manager is not None, "rank 0 has one"
        return self.manager

    @property
    def may_rescue(self) -> bool:
        """Whether the policy asks for a rescue, and there is anything to save."""
        return bool(self._rescues and self.trainer.global_step)

    @property
    def is_last(self) -> bool:
        """Whether this callback is the last of its Trainer: it acts once for all, after they have reported."""
        return ours(self.trainer.callbacks)[-1] is self.callback

    def _is_due(self, *, ends_epoch: bool = False, timed: bool = True) -> bool:
        """Return whether the trigger may be due now; without ``timed`` the time is left out."""
        clock = self.callback._clock if timed else None
        return not self.horizon.covers(self.trainer.global_step, self.trainer.current_epoch, ends_epoch, clock)

    # Reports

    def report(self, moment: Moment) -> None:
        """Let rank 0 decide about what was measured at this moment, and save on all ranks if it decides to."""
        metrics = self._measured(moment)
        if metrics is None:
            return
        decision, attributes = self._decide(moment, metrics)
        callback, trainer, cache = self.callback, self.trainer, cache_of(self.trainer)
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        cache.begin((moment, trainer.global_step, trainer.current_epoch, batches))
        self.moment = moment
        try:
            callback._log_decision(trainer, decision, attributes)
            if isinstance(decision, Attach):
                attributes.set_on(callback)
                self._carried_out(decision)
            elif isinstance(decision, Save):
                with self._saving(decision, attributes):
                    callback._save_checkpoint(trainer, os.path.join(callback._folder, decision.name))
        finally:
            self.moment = None
            if self.is_last:
                cache.begin(None)

    def _measured(self, moment: Moment) -> dict[str, Any] | None:
        """Return the metrics of this step; None if the moment is not reported."""
        callback, trainer, step = self.callback, self.trainer, self.trainer.global_step
        if not step:  # Nothing was trained yet.
            return None
        # Every rank looks, because all ranks together may compute a metric.
        candidates = callback._monitor_candidates(trainer)
        fresh = self._metrics.at(step, trainer.callback_metrics)
        # A subclass may add metrics. Lightning adds epoch and step, which are metrics only if they were logged.
        added = candidates.keys() - trainer.callback_metrics.keys() - {"epoch", "step"}
        metrics = {name: value for name, value in candidates.items() if name in fresh or name in added}
        if not callback._reports(moment, trainer):
            return None
        self.collect()
        # A validation measures anew.
        return metrics if moment in ("validation", "asked") else self._metrics.as_ranked(metrics)

    def _decide(self, moment: Moment, metrics: dict[str, Any]) -> tuple[Decision, Attributes]:
        step, epoch = self.trainer.global_step, self.trainer.current_epoch
        ends, due = self.callback._ends_epoch(moment, self.trainer), self.callback._due(moment)
        if due or self._is_due(ends_epoch=ends):
            metrics = self.callback._ask(moment, self.trainer, metrics)
        if moment == "epoch":
            self._last_epoch = step, epoch, ends
        elif moment == "end" and self._last_epoch[0] == step:
            # The Trainer increments its epoch before the training ends.
            _, epoch, ends = self._last_epoch

        def decide() -> tuple[Decision, Horizon, Attributes]:
            decision = self.managing.session.decide(metrics, step, epoch, epoch_end=ends, due=due)
            # In the background an attachment is not durable yet, so the attributes do not include it.
            included = decision if self.background is None or isinstance(decision, Save) else None
            return decision, self.managing.session.horizon, self.attributes(included)

        decision, self.horizon, attributes = on_rank_zero(self.ranks, decide)
        # If a step waits for a metric, the rules have not looked at it yet.
        if not isinstance(decision, Skip) or (decision.due and not decision.waiting):
            self._metrics.rank(metrics)
        return decision, attributes

    # Saves

    @contextlib.contextmanager
    def _saving(self, decision: Save, attributes: Attributes) -> Iterator[None]:
        self.collect(waits=True)
        self._before = self._current()
        attributes.set_on(self.callback)  # Before the save, because the attributes are part of the saved state.
        self.pending = decision
        try:
            yield
        except BaseException:
            vars(self.callback).update(self._before)
            raise
        finally:
            self.pending, self._before = None, {}

    def committed(self, decision: Decision) -> None:
        """Set the attributes after a commit, and call the loggers if the file is durable."""
        self.horizon, attributes = on_rank_zero(self.ranks, lambda: (self.managing.session.horizon, self.attributes()))
        vars(self.callback).update(self._before)
        attributes.set_on(self.callback)
        if isinstance(decision, Save):  # Else the write failed, and that is tolerated.
            self.callback._last_global_step_saved = self.trainer.global_step
            self._carried_out(decision)

    def _carried_out(self, decision: Save | Attach) -> None:
        if self.background is not None:
            self.background.is_pending = True
            return
        saved = [(decision.name, True)] if isinstance(decision, Save) else []
        self._on_durable([*saved, *((name, False) for name in decision.retire)])

    def collect(self, *, waits: bool = False, is_alone: bool = False) -> None:
        """Set the attributes and call the loggers for what was written in the background; raise what failed there.

        With ``waits`` the writer thread is idle afterwards. With ``is_alone`` rank 0 does it without the other ranks.
        """
        background = self.background
        if background is None or not background.is_pending or (is_alone and self.ranks.rank):
            return

        def look() -> tuple[list[tuple[str, bool]], bool, Attributes]:
            if waits:
                background.wait(self.managing, self.trainer.global_step, self.grace.left)
            is_idle = self.managing.wait(0)
            return background.take(), is_idle, self.attributes()

        events, is_idle, attributes = look() if is_alone else on_rank_zero(self.ranks, look)
        background.is_pending = not is_idle
        attributes.set_on(self.callback)
        self._on_durable(events)

    def _on_durable(self, events: Iterable[tuple[str, bool]]) -> None:
        callback, trainer = self.callback, self.trainer
        for name, is_saved in events:
            path = os.path.join(callback._folder, name)
            if not is_saved:
                callback._remove_checkpoint(trainer, path)
                continue
            callback._last_checkpoint_saved = path
            for logger in trainer.loggers if trainer.is_global_zero else ():
                logger.after_save_checkpoint(weakref.proxy(callback))

    # Attributes

    def attributes(self, decision: Decision | None = None) -> Attributes:
        """Return the attributes that show the records on rank 0, after a decision if one is given."""
        manager = self.managing
        manifest = manager.session.manifest if decision is None else manager.session.after(decision)
        going = {record.name for record in manifest.aside}
        if decision is None and self.background is not None:
            going |= {record.name for record in manifest.history} - manager.session.after(_NOTHING).by_name.keys()
        return attributes_of(manager.policy, manifest, self.callback._folder, self.callback.save_top_k, going)

    def _current(self) -> dict[str, Any]:
        return {name: vars(self.callback)[name] for name in NAMES}

    @contextlib.contextmanager
    def outlook(self) -> Iterator[None]:
        """Set the attributes to what they will be once pending saves are durable, because a state is read later."""
        if self.background is None or self.manager is None or self.pending is not None:
            yield
            return
        before = self._current()
        self.attributes(_NOTHING).set_on(self.callback)
        try:
            yield
        finally:
            vars(self.callback).update(before)

    def agree(self, *, reports: bool) -> tuple[bool, bool, bool, bool]:
        """Return for all ranks alike: whether to report this batch, to collect, to requeue the job, and to stop.

        All ranks know the step and the epoch. Of the time, the writer thread and the signals one rank may know.
        """
        is_late = reports and self.ranks.rank == 0 and self.callback._clock.time() >= self.horizon.time
        is_ready = self.background is not None and self.background.is_ready(self.manager)
        requeues = self.signals.requeue and self.is_last
        # Lightning itself stops a single rank.
        stops = self.signals.noted and self.ranks.size > 1 and self.is_last
        is_due = reports and self._is_due(timed=False)
        if not self.agreement(is_late or is_ready or requeues or stops):
            return is_due, False, False, False
        flags = self.ranks.highest(*map(float, (is_late, is_ready, requeues, stops)))
        is_late, is_ready, requeues, stops = (bool(flag) for flag in flags)
        return is_due or (reports and is_late), is_ready, requeues, stops
