"""One training on one rank: rank 0's manager decides, all ranks save, and the attributes follow the records."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal

import attrs

from checkpointer import Attach, CheckpointManager, Decision, Save, Skip
from checkpointer.distributed.ranks import Agreement, on_rank_zero
from checkpointer.hosts.grace import Grace
from checkpointer.policy.triggers import Horizon
from checkpointer.ports import Listener, Ranks
from checkpointer_lightning.attributes import NAMES, Attributes, attributes_of
from checkpointer_lightning.ranks import close_ranks, open_ranks
from checkpointer_lightning.siblings import label, ours, with_own_aliases
from checkpointer_lightning.signals import Signals, signals_of
from checkpointer_lightning.trainer_io import TrainerIO, cache_of

__all__ = ["Moment", "TrainingSession"]

Moment = Literal["batch", "validation", "epoch", "end", "asked"]
"""What has just ended: a training batch, a validation, an epoch, the training; or user code asks for a save."""

_log: Final = logging.getLogger("checkpointer")
_NOTHING: Final = Skip(reason="nothing is decided")


@attrs.define(eq=False)
class BackgroundEvents(Listener):
    """Queues the events of rank 0's writer thread until the training thread collects them."""

    is_pending: bool = False
    """Whether the end of a save or an attachment was not collected yet; the same on every rank."""
    _has_waited: bool = False
    _saved: deque[str] = attrs.field(factory=deque)
    _retired: deque[str] = attrs.field(factory=deque)

    def on_saved(self, record: Any) -> None:
        """See `Listener.on_saved`."""
        if record.kind == "regular":  # Loggers are not called for a rescue.
            self._saved.append(record.name)

    def on_retired(self, record: Any) -> None:
        """See `Listener.on_retired`."""
        self._retired.append(record.name)

    def is_ready(self, manager: CheckpointManager | None) -> bool:
        """Return whether all pending work of the writer thread has ended, on rank 0."""
        return self.is_pending and manager is not None and not _unfinished(manager)

    def wait(self, manager: CheckpointManager, step: int, timeout: float | None) -> None:
        """Wait at most ``timeout`` seconds until the writer thread is idle, and log a wait. Raises what failed."""
        running = _unfinished(manager)
        started = time.monotonic()
        manager.wait(timeout)
        if running:
            level = logging.INFO if self._has_waited else logging.WARNING
            self._has_waited = True
            waited = time.monotonic() - started
            _log.log(level, "step %d: waited %.3g s for %s to be written", step, waited, running[0])

    def take(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the names of what was saved and retired since the last call."""
        return _drained(self._saved), _drained(self._retired)


def _unfinished(manager: CheckpointManager) -> tuple[str, ...]:
    status = manager.session.background_status
    return status.unfinished if status is not None else ()


def _drained(names: deque[str]) -> tuple[str, ...]:
    return tuple(names.popleft() for _ in range(len(names)))


class FreshMetrics:
    """Remembers the step at which each metric was measured: a Trainer returns old values until new ones replace them.

    Two measurements may give equal numbers, so numbers are not compared: a new measurement is a new tensor.
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[Any, int]] = {}
        self._ranked: tuple[int, Mapping[str, Any]] = -1, {}

    def at(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Return the metrics that were measured at ``step``, which is the training's step now."""
        for name, value in metrics.items():
            seen = self._seen.get(name)
            if seen is None or not _is_same(seen[0], value):
                self._seen[name] = value, step
        return {name: value for name, value in metrics.items() if self._seen[name][1] == step}

    def rank(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Remember the metrics that a step was ranked by."""
        self._ranked = step, {**self._ranked_at(step), **metrics}

    def as_ranked(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Return the metrics, with the values that the step was ranked by if it was ranked.

        With ``on_step=True, on_epoch=True`` a Trainer shows a batch's value first. At the end of the epoch it shows the
        mean of all batches under the same name: another quantity, which does not measure the step's weights.
        """
        ranked = self._ranked_at(step)
        return {name: ranked.get(name, value) for name, value in metrics.items()}

    def _ranked_at(self, step: int) -> Mapping[str, Any]:
        return self._ranked[1] if self._ranked[0] == step else {}


@attrs.define(eq=False)
class TrainingSession:
    """Exists from the start of a training to its end."""

    callback: Any
    trainer: Any
    ranks: Ranks
    io: TrainerIO
    signals: Signals
    grace: Grace
    """Seconds that are left after a SIGTERM."""
    rescues: bool
    """Whether the policy saves when something ends the training."""
    background: BackgroundEvents | None
    """Set if the manager writes in the background."""
    horizon: Horizon = attrs.field(init=False)
    manager: CheckpointManager | None = attrs.field(default=None, init=False)
    """Only rank 0 has one."""
    agreement: Agreement = attrs.field(init=False)
    """Reports to all ranks what has happened on one of them."""
    validation_agreement: Agreement | None = attrs.field(default=None, init=False)
    """How the ranks agree to stop within the running validation; None if they wait for its end."""
    moment: Moment | None = attrs.field(default=None, init=False)
    """What is being reported."""
    is_validating: bool = attrs.field(default=False, init=False)
    """Whether a validation has begun and not ended."""
    pending: Save | None = attrs.field(default=None, init=False)
    """The decision that `_save_checkpoint` carries out."""
    _metrics: FreshMetrics = attrs.field(factory=FreshMetrics, init=False)
    _last_epoch: tuple[int, int, bool] = attrs.field(default=(-1, -1, False), init=False)
    """The last report of an epoch: its step, its index, and whether the epoch was complete."""
    _before: Mapping[str, Any] = attrs.field(factory=dict, init=False)
    """The attributes before the pending save."""

    @classmethod
    def open(cls, callback: Any, trainer: Any) -> TrainingSession:
        """Open the directory on rank 0, and continue the run that was loaded."""
        number = callback._directory_index(trainer)
        policy = with_own_aliases(callback._make_policy(), number)
        ranks = open_ranks(trainer)
        weights_only = policy.contents == "weights"
        io = TrainerIO(trainer, callback._package, ranks, lambda: callback._dump(trainer), weights_only)
        options = {**callback._options, **io.manager_options(callback._background)}
        background = BackgroundEvents() if options.get("background") else None
        if background is not None:
            options["listeners"] = (*options.get("listeners", ()), background)
        grace = Grace(callback._grace_s)
        session = cls(callback, trainer, ranks, io, signals_of(trainer), grace, policy.rescue, background)
        session.agreement = Agreement(ranks)

        def open_manager() -> Horizon:
            session.manager = manager = CheckpointManager(
                callback._folder, policy, label=label(number), clock=callback._clock, **options
            )
            callback._resume.apply(manager, policy, callback, trainer)
            return manager.session.horizon

        try:
            session.horizon = on_rank_zero(ranks, open_manager)
        except BaseException:
            session.close()
            raise
        return session

    def close(self) -> None:
        """Close the directory, within the seconds that are left."""
        try:
            if self.manager is not None:
                self.manager.close(timeout=self.grace.left)
        finally:
            close_ranks(self.ranks)

    @property
    def managing(self) -> CheckpointManager:
        """The manager, on rank 0."""
        assert self.manager is not None, "rank 0 has one"
        return self.manager

    @property
    def is_last(self) -> bool:
        """Whether this callback is the last of its Trainer: it acts once for all, after they have reported."""
        return ours(self.trainer.callbacks)[-1] is self.callback

    def is_due(self, *, ends_epoch: bool = False, timed: bool = True) -> bool:
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
        with self._at(moment):
            self.callback._log_decision(self.trainer, decision, attributes)
            if isinstance(decision, Attach):
                attributes.set_on(self.callback)
                self._carried_out((), decision.retire)
            elif isinstance(decision, Save):
                with self._saving(decision, attributes):
                    self.callback._save_checkpoint(self.trainer, os.path.join(self.callback._folder, decision.name))

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
        return metrics if moment in ("validation", "asked") else self._metrics.as_ranked(step, metrics)

    def _decide(self, moment: Moment, metrics: dict[str, Any]) -> tuple[Decision, Attributes]:
        step, epoch = self.trainer.global_step, self.trainer.current_epoch
        ends, due = self.callback._ends_epoch(moment, self.trainer), self.callback._due(moment)
        if due or self.is_due(ends_epoch=ends):
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
            self._metrics.rank(step, metrics)
        return decision, attributes

    @contextlib.contextmanager
    def _at(self, moment: Moment) -> Iterator[None]:
        trainer, cache = self.trainer, cache_of(self.trainer)
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        cache.begin((moment, trainer.global_step, trainer.current_epoch, batches))
        self.moment = moment
        try:
            yield
        finally:
            self.moment = None
            if self.is_last:
                cache.begin(None)

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
            self._carried_out((decision.name,), decision.retire)

    def _carried_out(self, saved: tuple[str, ...], retired: tuple[str, ...]) -> None:
        if self.background is not None:
            self.background.is_pending = True
        else:
            self._on_durable(saved, retired)

    def collect(self, *, waits: bool = False, is_alone: bool = False) -> None:
        """Set the attributes and call the loggers for what was written in the background; raise what failed there.

        With ``waits`` the writer thread is idle afterwards. With ``is_alone`` rank 0 does it without the other ranks.
        """
        background = self.background
        if background is None or not background.is_pending or (is_alone and self.ranks.rank):
            return

        def look() -> tuple[tuple[str, ...], tuple[str, ...], bool, Attributes]:
            if waits:
                background.wait(self.managing, self.trainer.global_step, self.grace.left)
            is_idle = self.managing.wait(0)
            return *background.take(), is_idle, self.attributes()

        saved, retired, is_idle, attributes = look() if is_alone else on_rank_zero(self.ranks, look)
        background.is_pending = not is_idle
        attributes.set_on(self.callback)
        self._on_durable(saved, retired)

    def _on_durable(self, saved: tuple[str, ...], retired: tuple[str, ...]) -> None:
        callback, trainer = self.callback, self.trainer
        for name in saved:
            callback._last_checkpoint_saved = os.path.join(callback._folder, name)
            for logger in trainer.loggers if trainer.is_global_zero else ():
                logger.after_save_checkpoint(weakref.proxy(callback))
        for name in retired:
            callback._remove_checkpoint(trainer, os.path.join(callback._folder, name))

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

    # Several ranks

    def agree(self, *, reports: bool) -> tuple[bool, bool, bool, bool]:
        """Return for all ranks alike: whether to report this batch, to collect, to requeue the job, and to stop.

        All ranks know the step and the epoch. Of the time, the writer thread and the signals one rank may know.
        """
        is_late = reports and self.ranks.rank == 0 and self.callback._clock.time() >= self.horizon.time
        is_ready = self.background is not None and self.background.is_ready(self.manager)
        requeues = self.signals.requeue and self.is_last
        stops = self.signals.noted and self.is_last
        is_due = reports and self.is_due(timed=False)
        if not self.agreement(is_late or is_ready or requeues or stops):
            return is_due, False, False, False
        flags = self.ranks.highest(*map(float, (is_late, is_ready, requeues, stops)))
        is_late, is_ready, requeues, stops = (bool(flag) for flag in flags)
        return is_due or (reports and is_late), is_ready, requeues, stops


def _is_same(old: Any, new: Any) -> bool:
    """Return whether two tensors are one measurement: the Trainer returns views of one memory."""
    if old is new:
        return True
    try:
        return bool(old.data_ptr() == new.data_ptr())
    except (AttributeError, RuntimeError):  # Not a tensor, or one without memory of its own.
        return False
