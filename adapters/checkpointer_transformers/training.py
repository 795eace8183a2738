"""One training, from its begin to its end, on every rank; rank 0 also has the `Leader`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import attrs

from checkpointer import Decision, KeepBest, Observation, Policy, Save, Skip
from checkpointer.distributed.team import Agreement, Broadcast, Team
from checkpointer.policy.triggers import Horizon
from checkpointer.ports import Clock, Ranks
from checkpointer_transformers.leader import Leader
from checkpointer_transformers.trainer_state import (
    best_of,
    epoch_of,
    observation,
    owes_evaluation,
    show_best,
)

Phase = Literal["between", "forward", "stepping"]
"""Where the training is: between two steps, in the passes, or where weights and optimizer do not belong together."""


@attrs.define(eq=False)
class Training:
    """The state of one ``Trainer.train`` on one rank; rank 0 also has the `Leader`."""

    folder: Path
    output_dir: str
    """The folder as the Trainer names it."""
    policy: Policy
    ranks: Ranks
    clock: Clock
    options: Mapping[str, Any]
    """Further options of the manager."""
    phase: Phase = attrs.field(default="between", init=False)
    pending: Save | None = attrs.field(default=None, init=False)
    stopping: bool = attrs.field(default=False, init=False)
    """Whether a rescue ended the training."""
    owes_evaluation: bool = attrs.field(default=False, init=False)
    """Whether a signal left out the evaluation of this step, or ended it."""
    ended: bool = attrs.field(default=False, init=False)
    """Whether the end of the training was seen."""
    failing: bool = attrs.field(default=False, init=False)
    """Whether a save is under way, or has failed."""
    write: Callable[[str], None] | None = attrs.field(default=None, init=False)
    """Lets the Trainer write to a staged path, while it wants to."""
    leader: Leader | None = attrs.field(default=None, init=False)
    """Rank 0's part; None on the other ranks."""
    is_waiting: bool = attrs.field(default=False, init=False)
    """Whether a report without metrics is useless, because what is due waits for a metric."""
    team: Team = attrs.field(init=False)
    due: str = attrs.field(default="", init=False)
    """Why the last report was due whatever the trigger says."""
    _horizon: Horizon = attrs.field(init=False)
    _agreement: Agreement = attrs.field(init=False)
    _metrics: tuple[int, dict[str, Any]] = attrs.field(default=(-1, {}), init=False)
    _saved_step: int = attrs.field(default=-1, init=False)
    _ended_step: int = attrs.field(default=-1, init=False)
    _held_back: bool = attrs.field(default=False, init=False)
    """Whether the last log had values that were not taken."""

    def __attrs_post_init__(self) -> None:
        self._agreement = Agreement(self.ranks)
        self.team = Team(self.ranks, {"write": self._write})

    def open(self, state: Any, again: Mapping[str, Any]) -> None:
        """Open the folder, and go on with the run that the Trainer resumed, or with one that it begins ``again``."""
        self.owes_evaluation = owes_evaluation(state)
        self._on_rank_zero(state, lambda leader: leader.resume(state, again))

    def state_dict(self) -> dict[str, Any]:
        """Return what the next training goes on from, if it takes this one's place; empty but on rank 0."""
        return {} if self.leader is None else self.leader.manager.session.state_dict()

    def close(self, *, timeout: float | None = None) -> None:
        """Release the folder, and wait as `CheckpointManager.close` does. A second call does nothing."""
        if self.leader is not None:
            self.leader.close(timeout=timeout)

    def _on_rank_zero(self, state: Any, act: Callable[[Leader], Decision]) -> Decision:
        def work() -> Broadcast[Decision]:
            self.leader = leader = self.leader or Leader(self)
            decision, session = act(leader), leader.manager.session
            is_saved = session.manifest.at_step(state.global_step) is not None
            return Broadcast(decision, session.horizon, (best_of(self.policy, session.manifest), is_saved))

        received = self.team.work(work)
        decision, self._horizon = received.result, received.horizon
        best, is_saved = received.view
        self._saved_step = state.global_step if is_saved else -1
        self.is_waiting = isinstance(decision, Skip) and bool(decision.waiting) and _needs_metric(self.policy)
        self.pending = decision if isinstance(decision, Save) else self.pending
        show_best(best, state, self.output_dir)
        return decision

    def _write(self, path: str) -> None:
        assert self.write is not None, "the Trainer wants to write"
        self.write(path)

    # Whether there is anything to report

    def is_quiet(self, state: Any, epochs: int) -> bool:
        """Return whether neither the step nor the count of finished epochs can be due; alike on every rank."""
        return self._horizon.covers(state.global_step, epochs, epoch_end=False)

    def is_saved(self, state: Any) -> bool:
        """Return whether the step is saved, and takes what is measured now."""
        return bool(self._saved_step == state.global_step)

    def agreed(self, *, flag: bool, attached: bool) -> bool:
        """Return whether the clock, or ``flag`` on any rank, calls for a report; the ranks communicate seldom."""
        timed = self._horizon.time
        if timed == math.inf:
            return self._agreement(flag) if attached else False
        # Clocks differ, so only rank 0's decides.
        return self._agreement(flag or (self.ranks.rank == 0 and self.clock.time() >= timed))

    def measured(self, state: Any, metrics: Mapping[str, Any], *, anew: bool) -> bool:
        """Take in what was measured at this step; return whether it calls for a report.

        If the step was ranked by a value, the value stays unless an evaluation measured it ``anew``: what is logged
        later under the same name, such as the mean of an epoch, is another quantity. Only names decide what is
        returned, so it is the same on every rank.
        """
        step, before = state.global_step, self._metrics_at(state.global_step)
        is_ranked = self.is_saved(state) or self.pending is not None
        held_back = metrics.keys() & before.keys() if is_ranked and not anew else set()
        is_new = (anew and self._held_back) or not metrics.keys() <= before.keys()
        self._held_back = bool(held_back)
        taken = {name: value for name, value in metrics.items() if name not in held_back}
        self._metrics = step, {**before, **taken}
        if self.pending is not None or self.stopping or (anew and not is_new):
            return False
        return self.is_saved(state) or not self.is_quiet(state, epoch_of(state) + (self._ended_step == step))

    # Deciding and committing

    def report(self, state: Any, *, epoch_end: bool = False, due: str = "", is_written: bool = False) -> Decision:
        """Let rank 0 decide on what is known of this step, and prepare what it decided.

        ``is_written``: the Trainer has written the checkpoint already, although the policy did not ask for it.
        """
        self.due = due
        self._ended_step = state.global_step if epoch_end else self._ended_step
        act = Leader.report_written if is_written else Leader.report
        return self._on_rank_zero(state, lambda leader: act(leader, self._now(state)))

    def rescue(self, state: Any, reason: str) -> Decision:
        """Decide on a rescue of this step, unless it is saved already."""
        return self._on_rank_zero(state, lambda leader: leader.rescue(self._now(state), reason))

    def commit(self, state: Any, optimizer: Any, *, is_written: bool) -> None:
        """Carry out what is pending; ``is_written``: the Trainer has written its final name, on this rank."""
        decision, self.pending = self.pending, None
        assert decision is not None, "something is pending"
        if is_written:
            self.ranks.gather(None)  # Another rank may still be writing.

        def commit(leader: Leader) -> Decision:
            return leader.commit(decision, self._now(state), state=state, optimizer=optimizer, is_written=is_written)

        self._on_rank_zero(state, commit)
        self.pending = None

    def _metrics_at(self, step: int) -> dict[str, Any]:
        return self._metrics[1] if self._metrics[0] == step else {}

    def _now(self, state: Any) -> Observation:
        step = state.global_step
        return observation(self._metrics_at(step), state, self.clock, epoch_end=self._ended_step == step)


def _needs_metric(policy: Policy) -> bool:
    """Return whether nothing is saved without a metric."""
    keys = [rule.metric.key if isinstance(rule, KeepBest) else "step" for rule in policy.rules]
    return not policy.last and all(isinstance(key, str) and key not in ("epoch", "step") for key in keys)
