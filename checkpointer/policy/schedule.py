"""How far the loop is: what was due last, and below which step, epoch and time nothing is due."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, NoReturn

import attrs

from checkpointer.errors import MetricError, ObservationError
from checkpointer.policy.decide import Decision, Skip, advance
from checkpointer.policy.triggers import ALWAYS, NEVER, Horizon, Trigger, horizon_of
from checkpointer.ports import Clock
from checkpointer.records.record import Observation, Progress, as_metrics

_RESTORED: Final[Mapping[str, float]] = MappingProxyType({})
"""Stands for the metrics while nothing was reported since the restore."""


@attrs.define
class Schedule:
    """What a manager remembers of the loop between two reports."""

    when: Trigger
    since: Progress = attrs.field(factory=Progress)
    """The last due observation, saved or declined."""
    owed: str = ""
    """Why a point was due that still waits for a metric; empty if none does."""
    start: int = -1
    """The step that the run goes on from; -1 for a new run."""
    horizon: Horizon = ALWAYS
    """Below which nothing is due."""
    quiet: Skip = attrs.field(factory=lambda: Skip(reason="nothing was worked out yet"))
    """The decision on what lies below the horizon."""
    _in_force: Horizon = ALWAYS
    """The horizon, or one that covers nothing while there is something to report."""
    _is_awake: bool = False
    _report: tuple[Any, int, int, bool | None] = (_RESTORED, -1, 0, False)
    """The newest report: metrics, step, epoch, and whether it ended the epoch."""
    _epoch_ended: tuple[int, int] = (-1, -1)
    """The epoch that a report ended without ``epoch_end``, and its step."""

    # The hot path

    def is_quiet(
        self, metrics: Mapping[str, Any], step: int, epoch: int | None, epoch_end: bool | None, clock: Clock
    ) -> bool:
        """Return whether nothing is due at this report, and then remember it: a few comparisons."""
        if epoch is None:
            epoch, epoch_end = epoch_of(self._report[1:], step, epoch_end)
        ahead = self._in_force
        if (  # As `Horizon.covers`, without a call.
            self._report[1] < step < ahead.step
            and (ahead.epochs == NEVER or (epoch_end is not None and epoch + epoch_end < ahead.epochs))
            and (ahead.time == NEVER or clock.time() < ahead.time)
        ):
            self._report = (metrics, step, epoch, epoch_end)
            return True
        return False

    @property
    def last_step(self) -> int:
        """The newest step that was reported or restored; -1 before the first."""
        return self._report[1]

    def wake(self) -> None:
        """Let no report be quiet until `calm`: there is something to say. Safe to call from any thread."""
        self._is_awake = True
        self._in_force = ALWAYS

    def calm(self) -> None:
        """Let reports be quiet again. What there is to say is asked for after this: so nothing is missed."""
        if self._is_awake:
            self._is_awake = False
            self._sleep()

    def _sleep(self) -> None:
        self._in_force = self.horizon
        if self._is_awake:  # Looked at last, for another thread may have called `wake` meanwhile.
            self._in_force = ALWAYS

    def look_ahead(self, time: float) -> None:
        """Work out below which step, epoch and time nothing is due."""
        self.horizon = ALWAYS if self.owed or self.since.time > time else horizon_of(self.when, self.since)
        self.quiet = Skip(reason=f"not due{self.horizon.text()} ({self.when})")
        self._sleep()

    # What was reported

    def observation(self, metrics: Any, step: Any, epoch: Any, *, epoch_end: bool | None, time: float) -> Observation:
        """Return a report as an observation.

        The step counts as reported even if the metrics are refused, because the state is of that step. A step before
        the newest one leaves no trace: it is refused, or it brings late metrics for a step that is saved.
        """
        if epoch is None:
            epoch, epoch_end = epoch_of(self._report[1:], step, epoch_end)
        ended = True if epoch_end is None else bool(epoch_end)
        place = Observation(step=step, epoch=epoch, epoch_end=ended, time=time)
        goes_on = place.step >= self.last_step
        if goes_on:
            self._report = ({}, place.step, place.epoch, False)
        now = attrs.evolve(place, metrics=metrics)
        if goes_on:
            if epoch_end is None:
                self._check_epoch(now)
                self._epoch_ended = (now.epoch, now.step)
            self._report = (now.metrics, now.step, now.epoch, ended)
        return now

    def _check_epoch(self, now: Observation) -> None:
        before, at_step = self._epoch_ended
        if self.horizon.epochs < NEVER and before == now.epoch and at_step != now.step:
            msg = (
                f"epoch {now.epoch} ended at step {at_step} and again at step {now.step}; pass "
                "epoch_end=True at the end of an epoch and epoch_end=False within it"
            )
            raise ObservationError(msg)

    def last_report(self, step: int | None, epoch: int | None, time: float) -> Observation | None:
        """Return what was reported last, as it is for a rescue; None if nothing was reported."""
        metrics, seen_step, seen_epoch, ended = self._report
        if metrics is _RESTORED and step is None:
            return None
        if step is not None and step < self.start:
            msg = (
                f"a rescue of step {step} was asked for, and the run goes on from step {self.start}; pass the number "
                "of optimizer steps that are finished"
            )
            raise ObservationError(msg)
        at = seen_step if step is None else step
        usable: Mapping[str, float] = {}
        if at == seen_step:
            # A report that was not checked yet must not make a rescue fail.
            with contextlib.suppress(MetricError):
                usable = as_metrics(metrics)
        return Observation(
            metrics=usable,
            step=at,
            epoch=seen_epoch if epoch is None else epoch,
            epoch_end=bool(ended) and at == seen_step,
            time=time,
        )

    def refuse(self, step: int) -> NoReturn:
        """Raise the error for a step that went back."""
        if self.last_step == self.start:
            msg = (
                f"step {step} was reported, but the run goes on from step {self.start}: start the loop after what was "
                "restored (restored.step, restored.epoch), or use another directory for another training"
            )
        else:
            msg = (
                f"the step went back from {self.last_step} to {step}; after loading an older state call restore(), "
                "for another training make another manager"
            )
        raise ObservationError(msg)

    # What was due

    def take(self, decision: Decision, now: Observation, time: float, *, is_writing: bool = False) -> None:
        """Take in what became of an observation; ``is_writing`` as it was when that was decided."""
        since, self.owed = advance(decision, now, self.when, since=self.since, owed=self.owed, is_writing=is_writing)
        if since is not self.since:
            self.since = since
            self.look_ahead(time)

    def go_on(self, progress: Progress, time: float, *, step: int | None = None, owed: str = "") -> None:
        """Begin anew from a checkpoint; ``step`` is where the loop is, if not where the last due observation was."""
        self.since, self.owed = progress, owed
        self.start = step if step is not None else progress.step or -1
        self._report, self._epoch_ended = (_RESTORED, self.start, progress.epochs, False), (-1, -1)
        self.look_ahead(time)


def epoch_of(last: tuple[int, int, bool | None], step: int, epoch_end: bool | None) -> tuple[int, bool]:
    """Return the epoch of a report that names none, and whether the report ends it.

    ``last`` is the step, epoch and end of the report before. A second report of a step is of the same epoch.
    """
    at, epoch, ended = last
    if step == at:
        return epoch, bool(ended if epoch_end is None else epoch_end)
    return epoch + (ended is not False), bool(epoch_end)
