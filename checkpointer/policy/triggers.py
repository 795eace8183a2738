"""Triggers say whether an observation is due. They are pure: the last due observation is an argument."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Final, Literal, Protocol, runtime_checkable

import attrs

from checkpointer._display import count_text, every_text
from checkpointer._validation import as_seconds, ask, brief, named_function, one_of, whole_number
from checkpointer.errors import PolicyError
from checkpointer.ports import Clock
from checkpointer.records.record import Progress

NEVER: Final = math.inf
"""A bound that is never reached."""


@runtime_checkable
class Trigger(Protocol):
    """Decides whether an observation is due. One method, because that is all a policy asks."""

    def due(self, now: Progress, since: Progress) -> str | None:
        """Return why ``now`` is due, in short, or None.

        ``since`` is the last due observation, saved or declined; zeros and the start time before the first.
        Must depend on the arguments alone.
        """
        ...


@attrs.frozen(kw_only=True)
class Horizon:
    """Bounds below which nothing is due: the manager's fast path compares three numbers and returns."""

    step: float = NEVER
    """Nothing is due while the step is below this ..."""
    epochs: float = NEVER
    """... and the count of finished epochs below this ..."""
    time: float = NEVER
    """... and the time (seconds since the Unix epoch) below this."""

    def covers(self, step: int, epoch: int, epoch_end: bool | None, clock: Clock | None = None) -> bool:
        """Return whether nothing can be due at a report, whose arguments are as for `CheckpointManager.observe`.

        Without a clock the time is left out. All ranks know the rest, but their clocks differ.
        """
        return (
            step < self.step
            and (self.epochs == NEVER or (epoch_end is not None and epoch + epoch_end < self.epochs))
            and (self.time == NEVER or clock is None or clock.time() < self.time)
        )

    def text(self) -> str:
        """Return before what nothing is due, to follow "not due"; empty if nothing ever is."""
        parts = [f"step {self.step:g}"] if math.isfinite(self.step) else []
        parts += [f"{self.epochs:g} finished epochs"] if math.isfinite(self.epochs) else []
        parts += ["the next interval ends"] if math.isfinite(self.time) else []
        return f" before {' or '.join(parts)}" if parts else ""


ALWAYS = Horizon(step=-math.inf)


@runtime_checkable
class SupportsHorizon(Protocol):
    """A trigger that can say how far ahead nothing is due. Optional: without it every observation is asked."""

    def horizon(self, since: Progress) -> Horizon:
        """Return bounds below which `due` would answer None. Too low is slow, too high loses saves."""
        ...


def horizon_of(trigger: Trigger, since: Progress) -> Horizon:
    """Return the trigger's horizon, or one that never skips it."""
    return trigger.horizon(since) if isinstance(trigger, SupportsHorizon) else ALWAYS


def _next_multiple(n: int, since: int, after: int) -> int:
    """Return the first multiple of ``n`` beyond both counts."""
    return (max(since, after) // n + 1) * n


@attrs.frozen
class EverySteps:
    """Due whenever a multiple of ``n`` steps was reached or crossed since the last due observation.

    A loop that reports every step gets exactly the multiples of ``n``; one that reports every 7 steps misses none.

    Args:
        n: Steps between saves, at least 1.
        after: Nothing is due up to and including this step (warm-up).

    Example:
        >>> from checkpointer import EverySteps, Progress
        >>> EverySteps(10).due(Progress(step=14), since=Progress(step=0))
        'step 14 reached a multiple of 10'
    """

    n: int = attrs.field(validator=whole_number(1))
    after: int = attrs.field(default=0, validator=whole_number(0), kw_only=True)

    def due(self, now: Progress, since: Progress) -> str | None:
        """See `Trigger.due`."""
        if now.step < _next_multiple(self.n, since.step, self.after):
            return None
        return f"step {now.step} reached a multiple of {self.n}"

    def horizon(self, since: Progress) -> Horizon:
        """See `SupportsHorizon.horizon`."""
        return Horizon(step=_next_multiple(self.n, since.step, self.after))

    def __str__(self) -> str:
        return every_text(self.n, "step") + (f" after step {self.after}" if self.after else "")


@attrs.frozen
class EveryEpochs:
    """Due at the end of every ``n``-th epoch.

    Counts finished epochs: with ``n=2`` the epochs of index 1, 3, 5 and so on.

    Args:
        n: Epochs between saves, at least 1.
        after: Nothing is due until more than this many epochs are finished (warm-up).

    Example:
        >>> from checkpointer import EveryEpochs, Progress
        >>> EveryEpochs(2).due(Progress(epochs=2), since=Progress())
        '2 epochs finished, every 2 epochs'
    """

    n: int = attrs.field(validator=whole_number(1))
    after: int = attrs.field(default=0, validator=whole_number(0), kw_only=True)

    def due(self, now: Progress, since: Progress) -> str | None:
        """See `Trigger.due`."""
        if now.epochs < _next_multiple(self.n, since.epochs, self.after):
            return None
        return f"{count_text(now.epochs, 'epoch')} finished, {self}"

    def horizon(self, since: Progress) -> Horizon:
        """See `SupportsHorizon.horizon`."""
        return Horizon(epochs=_next_multiple(self.n, since.epochs, self.after))

    def __str__(self) -> str:
        return every_text(self.n, "epoch") + (f" after {count_text(self.after, 'epoch')}" if self.after else "")


@attrs.frozen
class DuringEpochs:
    """Due at each report of every ``n``-th epoch, however many reports there are in it.

    At each report this trigger checks one thing: is the number of finished epochs a multiple of ``n``? If an epoch has
    several reports, it is due at each of them. So report only with ``epoch_end=True``. `EveryEpochs` differs in two
    ways: it is due once in an epoch, and if an epoch was not reported, it is due at the next report.

    Args:
        n: Epochs from one due epoch to the next, at least 1.

    Raises:
        PolicyError: If ``n`` is not a whole number of at least 1.

    Example:
        >>> from checkpointer import DuringEpochs, Progress
        >>> [DuringEpochs(2).due(Progress(epochs=epochs), since=Progress()) for epochs in (2, 3)]
        ['epoch 2, a multiple of 2', None]
    """

    n: int = attrs.field(validator=whole_number(1))

    def due(self, now: Progress, since: Progress) -> str | None:
        """See `Trigger.due`."""
        if not now.epochs or now.epochs % self.n:
            return None
        return f"epoch {now.epochs}, a multiple of {self.n}"

    def horizon(self, since: Progress) -> Horizon:
        """See `SupportsHorizon.horizon`."""
        return Horizon(epochs=_next_multiple(self.n, max(since.epochs - 1, 0), 0))

    def __str__(self) -> str:
        return f"at each report of {every_text(self.n, 'epoch')}"


def _as_seconds(value: Any) -> float:
    return as_seconds(value, "the interval of the trigger")


@attrs.frozen
class EverySeconds:
    """Due when ``seconds`` have passed since the last due observation, across restarts.

    After a restart the clock runs on from the restored checkpoint, or from the first start if none was written:
    three runs of 0.7 s under an interval of 1 s do save. A clock that was set back counts as due.

    Args:
        seconds: Seconds of at least 0, or a `datetime.timedelta`.

    Example:
        >>> from datetime import timedelta
        >>> from checkpointer import EverySeconds
        >>> EverySeconds(timedelta(minutes=30)).seconds
        1800.0
    """

    seconds: float = attrs.field(converter=_as_seconds)

    def due(self, now: Progress, since: Progress) -> str | None:
        """See `Trigger.due`."""
        elapsed = now.time - since.time
        if elapsed < 0:
            return f"the clock went back by {-elapsed:.0f} s"
        # The bound is computed as in `horizon`, so that rounding cannot make the two disagree.
        return f"{elapsed:.0f} s passed, {self}" if now.time >= since.time + self.seconds else None

    def horizon(self, since: Progress) -> Horizon:
        """See `SupportsHorizon.horizon`."""
        return Horizon(time=since.time + self.seconds)

    def __str__(self) -> str:
        return f"every {self.seconds:g} s"


def _as_steps(steps: Any) -> tuple[int, ...]:
    try:
        steps = tuple(steps)
    except TypeError:
        steps = (steps,)
    for step in steps:
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            msg = f"AtSteps has {step!r}; expected whole numbers of at least 0"
            raise PolicyError(msg)
    return tuple(sorted(set(steps)))


@attrs.frozen(init=False)
class AtSteps:
    """Due when one of the listed steps was reached or crossed; without steps never.

    Args:
        *steps: The steps, each at least 1.

    Example:
        >>> from checkpointer import AtSteps, Progress
        >>> AtSteps(100, 1000).due(Progress(step=103), since=Progress(step=50))
        'step 103 reached 100'
    """

    steps: tuple[int, ...]

    def __init__(self, *steps: int) -> None:
        self.__attrs_init__(_as_steps(steps))

    def due(self, now: Progress, since: Progress) -> str | None:
        """See `Trigger.due`."""
        upcoming = self._upcoming(since)
        return f"step {now.step} reached {upcoming}" if now.step >= upcoming else None

    def horizon(self, since: Progress) -> Horizon:
        """See `SupportsHorizon.horizon`."""
        return Horizon(step=self._upcoming(since))

    def _upcoming(self, since: Progress) -> float:
        return next((step for step in self.steps if step > since.step), NEVER)

    def __str__(self) -> str:
        return "at steps " + ", ".join(map(str, self.steps)) if self.steps else "never"


def _is_metric(instance: object, field: object, value: Any) -> None:
    if not isinstance(value, str) or not value:
        msg = f"{type(instance).__name__}.metric is {brief(value)}; expected the name under which the loop reports it"
        raise PolicyError(msg)


@attrs.frozen
class EveryCount:
    """Due whenever a multiple of ``n`` was reached or crossed by a count that the loop reports as a metric.

    Such as samples or tokens. A report without the metric is never due. Each report is looked at, so it costs some
    microseconds instead of one.

    Args:
        metric: Name of the count among the metrics. It only grows, across restarts too.
        n: How much between saves, at least 1.

    Example:
        >>> from checkpointer import EveryCount, Progress
        >>> now = Progress(step=7, metrics={"tokens": 2_100_000})
        >>> EveryCount("tokens", 1_000_000).due(now, since=Progress(highest={"tokens": 1_900_000}))
        'tokens=2100000 reached a multiple of 1000000'
    """

    metric: str = attrs.field(validator=_is_metric)
    n: int = attrs.field(validator=whole_number(1))

    def due(self, now: Progress, since: Progress) -> str | None:
        """See `Trigger.due`."""
        count = now.metrics.get(self.metric, math.nan)
        if not math.isfinite(count) or count < _next_multiple(self.n, int(since.highest.get(self.metric, 0)), 0):
            return None
        return f"{self.metric}={count:.15g} reached a multiple of {self.n}"

    def __str__(self) -> str:
        return f"every {self.n} {self.metric}"


def _as_fraction(value: Any) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1:
        return float(value)
    msg = f"EveryFraction.fraction is {brief(value)}; expected more than 0 and at most 1, such as 0.1 for ten saves"
    raise PolicyError(msg)


@attrs.frozen
class EveryFraction:
    """Due each time a fraction of the whole training is finished: with ``0.1``, ten times in the training.

    The due steps are the multiples of ``fraction * of``. If a multiple is not a whole step, it is rounded up. If the
    training goes on after step ``of``, the trigger stays due at the same interval.

    Args:
        fraction: Part of the training between two saves, more than 0 and at most 1.
        of: Steps of the whole training, at least 1.

    Raises:
        PolicyError: If an argument is out of its range.

    Example:
        >>> from checkpointer import EveryFraction, Progress
        >>> EveryFraction(0.1, of=5000).due(Progress(step=1003), since=Progress(step=900))
        'step 1003 reached step 1000, every 0.1 of 5000 steps'
    """

    fraction: float = attrs.field(converter=_as_fraction)
    of: int = attrs.field(validator=whole_number(1))

    def due(self, now: Progress, since: Progress) -> str | None:
        """See `Trigger.due`."""
        upcoming = self._upcoming(since)
        return f"step {now.step} reached step {upcoming}, {self}" if now.step >= upcoming else None

    def horizon(self, since: Progress) -> Horizon:
        """See `SupportsHorizon.horizon`."""
        return Horizon(step=self._upcoming(since))

    def _upcoming(self, since: Progress) -> int:
        part = Fraction(str(self.fraction)) * self.of  # As it is written: 0.1 is a tenth.
        return max(math.ceil((since.step // part + 1) * part), since.step + 1)

    def __str__(self) -> str:
        return f"every {self.fraction:.6g} of {self.of} steps"


@attrs.frozen
class OnImprovement:
    """Due when a metric is better than at each due point before: nothing else makes it due.

    The first report of the metric counts as better. NaN and infinity never do. Each report is looked at, so it costs
    some microseconds instead of one.

    Args:
        metric: Name of the metric.
        mode: ``"min"`` or ``"max"``.

    Example:
        >>> from checkpointer import OnImprovement, Progress
        >>> OnImprovement("loss", mode="min").due(Progress(metrics={"loss": 0.3}), since=Progress(lowest={"loss": 0.4}))
        'loss=0.3 is better than 0.4'
    """

    metric: str = attrs.field(validator=_is_metric)
    mode: Literal["min", "max"] = attrs.field(validator=one_of("min", "max"), kw_only=True)

    def due(self, now: Progress, since: Progress) -> str | None:
        """See `Trigger.due`."""
        value = now.metrics.get(self.metric, math.nan)
        before = (since.lowest if self.mode == "min" else since.highest).get(self.metric)
        if not math.isfinite(value):
            return None
        if before is None:
            return f"{self.metric}={value:.6g} is the first"
        is_better = value < before if self.mode == "min" else value > before
        return f"{self.metric}={value:.6g} is better than {before:.6g}" if is_better else None

    def __str__(self) -> str:
        return f"when {self.metric} ({self.mode}) improves"


@attrs.frozen
class When:
    """Due when a function of the report says so.

    Each report is looked at, so it costs some microseconds instead of one.

    Args:
        predicate: A named function. It gets a `Progress` (step, finished epochs, time, metrics) and returns whether a
            save is due. It must depend on that alone.

    Raises:
        PolicyError: If it is not a function with a name of its own (a lambda has none).

    Example:
        >>> from checkpointer import Progress, When
        >>> def spike(now):
        ...     return now.metrics.get("loss", 0.0) > 10
        >>> When(spike).due(Progress(step=3, metrics={"loss": 12.5}), since=Progress())
        'spike at step 3'
    """

    predicate: Callable[[Progress], object] = attrs.field(validator=named_function)

    def due(self, now: Progress, since: Progress) -> str | None:
        """See `Trigger.due`."""
        return f"{self.predicate.__name__} at step {now.step}" if ask(self.predicate, now) else None

    def __str__(self) -> str:
        return f"when {self.predicate.__name__}"


@attrs.frozen
class Continuous:
    """Due as soon as the save before is written: as often as the storage allows, for ``background="wait"``.

    Without a background writer each report is due that comes ``min_s`` after the last due one.

    Args:
        min_s: Seconds of at least 0 between two saves, or a `datetime.timedelta`.

    Example:
        >>> from checkpointer import Continuous, Progress
        >>> start = Progress(time=0.0)
        >>> [Continuous(5).due(Progress(time=8.0, is_writing=busy), start) for busy in (True, False)]
        [None, '8 s passed, and nothing is being written']
    """

    min_s: float = attrs.field(default=0.0, converter=_as_seconds)

    def due(self, now: Progress, since: Progress) -> str | None:
        """See `Trigger.due`."""
        if now.is_writing or since.time <= now.time < since.time + self.min_s:
            return None
        return f"{max(now.time - since.time, 0):.0f} s passed, and nothing is being written"

    def horizon(self, since: Progress) -> Horizon:
        """See `SupportsHorizon.horizon`."""
        return Horizon(time=since.time + self.min_s)

    def __str__(self) -> str:
        return "as often as the storage allows" + (f", but at least {self.min_s:g} s apart" if self.min_s else "")


@attrs.frozen(init=False)
class AnyOf:
    """Due when any of its triggers is. All of them count from the same last due observation.

    Args:
        *triggers: The triggers. A trigger of your own has the method ``due``.

    Example:
        >>> from checkpointer import AnyOf, EverySeconds, EverySteps
        >>> print(AnyOf(EverySteps(1000), EverySeconds(1800)))
        every 1000 steps or every 1800 s
    """

    triggers: tuple[Trigger, ...]

    def __init__(self, *triggers: Trigger) -> None:
        for trigger in triggers:
            if isinstance(trigger, type) or not isinstance(trigger, Trigger):
                msg = f"AnyOf has {trigger!r}; expected triggers such as EverySteps(100)"
                raise PolicyError(msg)
        self.__attrs_init__(triggers)

    def due(self, now: Progress, since: Progress) -> str | None:
        """See `Trigger.due`."""
        reasons = [reason for trigger in self.triggers if (reason := trigger.due(now, since))]
        return "; ".join(reasons) or None

    def horizon(self, since: Progress) -> Horizon:
        """See `SupportsHorizon.horizon`."""
        horizons = [horizon_of(trigger, since) for trigger in self.triggers]
        return Horizon(
            step=min((h.step for h in horizons), default=NEVER),
            epochs=min((h.epochs for h in horizons), default=NEVER),
            time=min((h.time for h in horizons), default=NEVER),
        )

    def __str__(self) -> str:
        return " or ".join(map(str, self.triggers)) or "never"
