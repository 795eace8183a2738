"""Plays a policy over a history: what it would have saved, kept and retired, and what a crash would have cost."""

from __future__ import annotations

import attrs

from checkpointer.errors import ObservationError
from checkpointer.policy.decide import Attach, Decision, Save, Skip, advance, decide, own_name, surplus
from checkpointer.policy.policy import Policy
from checkpointer.policy.triggers import (
    AnyOf,
    Continuous,
    DuringEpochs,
    EveryCount,
    EveryEpochs,
    EverySeconds,
    OnImprovement,
    Trigger,
)
from checkpointer.records.manifest import Manifest
from checkpointer.records.record import Observation, Progress, Record
from checkpointer.tools.history import History


@attrs.frozen(kw_only=True)
class Moment:
    """The effect of one observation."""

    observation: Observation
    decision: Decision
    retired: tuple[str, ...]
    """Checkpoints that went."""
    num_kept: int
    """Number of checkpoints afterwards."""
    bytes: int
    """Bytes on disk afterwards."""
    peak_bytes: int
    """Bytes on disk before the retired checkpoints go: a save never waits for a delete."""
    lost_steps: int
    """Steps to be trained again if the run died now, before this observation's own checkpoint was there."""
    lost_s: float
    """The same in seconds."""


@attrs.frozen(kw_only=True)
class SimulatedCheckpoint:
    """One checkpoint from its save to its end."""

    record: Record
    retired_at: int | None = None
    """Step at which it was retired; None if it is kept."""


@attrs.frozen(kw_only=True)
class Timeline:
    """A history under a policy."""

    policy: Policy
    moments: tuple[Moment, ...]
    checkpoints: tuple[SimulatedCheckpoint, ...]
    """Every checkpoint there ever was, in the order of their saves."""
    manifest: Manifest
    """The records at the end."""

    @property
    def has_sizes(self) -> bool:
        """Whether the size of each checkpoint is known; else the bytes on disk are not."""
        return all(one.record.size for one in self.checkpoints)

    @property
    def peak_bytes(self) -> int:
        """The largest number of bytes on disk."""
        return max((moment.peak_bytes for moment in self.moments), default=0)

    @property
    def most_lost(self) -> Moment | None:
        """The worst moment for a crash."""
        return max(self.moments, key=lambda moment: (moment.lost_steps, moment.lost_s), default=None)


def simulate(policy: Policy, history: History, *, size: int = 0) -> Timeline:
    r"""Play a policy over a history, with the same `decide` that a manager calls.

    Args:
        policy: The policy to try.
        history: Observations in order, from `checkpointer.tools.history.read_history` or ``history_of``.
        size: Bytes of a checkpoint, if the history does not have its size.

    Raises:
        ObservationError: If the trigger counts epochs or seconds, and the history does not have them.
        NamingError: If the template asks for a metric that is never reported.

    Example:
        >>> from checkpointer import EverySteps, KeepLast, Policy
        >>> from checkpointer.tools.history import read_history
        >>> history = read_history(b"step\n10\n20\n30\n", "metrics.csv")
        >>> timeline = simulate(Policy(EverySteps(20), [KeepLast(1)]), history, size=100)
        >>> [(moment.observation.step, bool(moment.decision), moment.lost_steps) for moment in timeline.moments]
        [(10, False, 10), (20, True, 20), (30, False, 10)]
        >>> timeline.peak_bytes
        100
    """
    _check_counted(policy.when, history)
    play = _Play(policy, history, size)
    moments = tuple(map(play.observe, history.observations))
    checkpoints = tuple(
        SimulatedCheckpoint(record=record, retired_at=play.retired.get(token)) for token, record in play.born.items()
    )
    return Timeline(policy=policy, moments=moments, checkpoints=checkpoints, manifest=play.manifest)


def _check_counted(trigger: Trigger, history: History) -> None:
    for part in trigger.triggers if isinstance(trigger, AnyOf) else ():
        _check_counted(part, history)
    if isinstance(trigger, (EveryEpochs, DuringEpochs)) and not history.has_epochs:
        msg = f"the policy saves {trigger}, and the metrics have no column 'epoch'; add it, or try a trigger of steps"
        raise ObservationError(msg)
    if isinstance(trigger, (EverySeconds, Continuous)) and not history.has_times:
        msg = f"the policy saves {trigger}, and the metrics have no column 'time' (seconds); add it, or count steps"
        raise ObservationError(msg)
    if isinstance(trigger, (EveryCount, OnImprovement)) and trigger.metric not in history.metrics:
        have = ", ".join(history.metrics) or "none"
        msg = f"the policy saves {trigger}, and the metrics have no column {trigger.metric!r} (have: {have})"
        raise ObservationError(msg)


class _Play:
    """A manager without a disk."""

    def __init__(self, policy: Policy, history: History, size: int) -> None:
        self._policy = policy
        self._sizes, self._size = history.sizes, size
        self.manifest = Manifest(run="simulated")
        self._since = Progress(time=history.observations[0].time if history.observations else 0.0)
        self._begun = self._since.time
        self._owed = ""
        self._serial = 0
        self._bytes = 0
        self.born: dict[str, Record] = {}
        self.retired: dict[str, int] = {}

    def observe(self, now: Observation) -> Moment:
        newest = self.manifest.newest
        lost_steps = now.step - (newest.step if newest else 0)
        lost_s = now.time - (newest.time if newest else self._begun)
        if not self.manifest.seen.issuperset(now.metrics):
            self.manifest = attrs.evolve(self.manifest, seen=self.manifest.seen.union(now.metrics))
        decision = decide(self._policy, now, self.manifest, since=self._since, owed=self._owed)
        self._since, self._owed = advance(decision, now, self._policy.when, since=self._since, owed=self._owed)
        if isinstance(decision, Save):
            self._save(decision)
        elif isinstance(decision, Attach):
            self._attach(decision)
        peak = self._bytes
        gone = () if isinstance(decision, Skip) else (*surplus(self._policy, self.manifest), *self._slot_left())
        for name in gone:
            self._remove(self.manifest.by_name[name], now.step)
        self.manifest = self.manifest.without(*gone)
        return Moment(
            observation=now,
            decision=decision,
            retired=gone,
            num_kept=len(self.manifest.records),
            bytes=self._bytes,
            peak_bytes=peak,
            lost_steps=lost_steps,
            lost_s=lost_s,
        )

    def _slot_left(self) -> tuple[str, ...]:
        """Return the slot under the ``last`` alias if the alias names a newer checkpoint by now."""
        slot = self._policy.name.last_file
        newest = self.manifest.history[-1].name if self.manifest.history else slot
        return (slot,) if self._policy.last and slot in self.manifest.by_name and newest != slot else ()

    def _remove(self, record: Record, step: int) -> None:
        self.retired[record.token] = step
        self._bytes -= record.size

    def _save(self, decision: Save) -> None:
        now = decision.observation
        if decision.name in self.manifest.by_name:
            self._remove(self.manifest.by_name[decision.name], now.step)
        # The manifest would give a serial of a removed checkpoint again.
        self._serial += 1
        record = self.manifest.draft(
            decision.name,
            now,
            size=self._sizes.get(now.step, self._size),
            contents=self._policy.contents,
            reason=decision.reason,
            serial=self._serial,
            token=str(self._serial),
        )
        self.born[record.token] = record
        self._bytes += record.size
        self.manifest = self.manifest.with_record(record)

    def _attach(self, decision: Attach) -> None:
        saved = self.manifest.by_name[decision.name]
        record = saved.attached(decision.observation)
        if saved.name in self._policy.aliases:
            # A slot is overwritten by the next save; with its new metrics it may be one that a rule keeps.
            record = attrs.evolve(record, name=own_name(self._policy, saved, self.manifest))
        self.born[record.token] = record
        self.manifest = self.manifest.without(saved.name).with_record(record)
