"""One training, from its begin to its end, on every rank; rank 0 also decides, commits, and writes the claim."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import attrs

from checkpointer import CheckpointManager, Decision, KeepBest, Observation, Policy, Progress, Save, Skip
from checkpointer.distributed.team import Agreement, Broadcast, Team
from checkpointer.policy.decide import decide_rescue
from checkpointer.policy.swapped_weights import marked
from checkpointer.policy.triggers import Horizon
from checkpointer.ports import Clock, Ranks, SupportsSweep
from checkpointer.storage import open_storage
from checkpointer.storage.owner import new_owner, release
from checkpointer_transformers.integrity import STATE_FILE, checkpoints_of, problem_of, refuse_shards, step_of
from checkpointer_transformers.lock import Claim
from checkpointer_transformers.trainer_state import (
    best_of,
    ends_epoch,
    epoch_of,
    logged_at,
    observation,
    owes_evaluation,
    save_state,
    saved_state,
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
        if is_written and self.ranks.size > 1:
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


class Leader:
    """Rank 0's manager, and its claim in the folder."""

    _state: Any
    """The Trainer's state at a commit."""
    _final: Save
    """What is committed."""
    _optimizer: Any = None
    """The optimizer at a commit."""

    def __init__(self, training: Training) -> None:
        self._training, self._folder = training, training.folder
        self._owner = new_owner()
        self._term = 0
        self._is_writing = False
        self._doubtful: dict[str, str] = {}
        """Why each of these checkpoints may still be changed: a process that was replaced was writing it."""
        self._storage = open_storage(self._folder, self._owner)
        try:
            self.manager = CheckpointManager(
                self._folder, training.policy, save=self._save, clock=training.clock, **training.options
            )
        except BaseException:
            self._release()
            raise

    def close(self, *, timeout: float | None = None) -> None:
        """Release the folder, and wait as `CheckpointManager.close` does. A second call does nothing."""
        try:
            self.manager.close(timeout=timeout)
        finally:
            if not self._is_writing:
                Claim(owner=self._owner).remove(self._storage)
            self._release()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

    def _release(self) -> None:
        if isinstance(self._storage, SupportsSweep):
            self._storage.close()
        release(self._owner)

    # Resuming

    def resume(self, state: Any, again: Mapping[str, Any]) -> Skip:
        """Go on with the run that the Trainer resumed, or with one that begins ``again``."""
        step, claims = state.global_step, Claim.all_of(self._storage)
        claim = next((one for one in claims if one.writing == f"checkpoint-{step}"), Claim())
        if step:
            saved = saved_state(state) or claim.state
        else:
            since = Progress(time=self._training.clock.time()).to_dict()
            saved = {**again, "step": 0, "since": since, "owed": ""} if again else {}
        if saved:
            session = self.manager.session
            session.load_state_dict(saved, source=self._chosen(step, saved))
            self._term = session.hold()
            limits = session.manifest.limits
            same = [one for one in claims if one.run == saved.get("run") and one.writing]
            self._doubtful = {one.writing: one.why_doubtful(limits, self._term) for one in same if not one.has_ended}
            if claim in same and not claim.why_doubtful(limits, self._term):
                self._acknowledge(state, claim)
        self._claim()
        for one in claims:
            if one.has_ended and one.run in ("", saved.get("run")) and self._is_settled(one.writing):
                one.remove(self._storage)
        return Skip(reason="the training begins")

    def _is_settled(self, name: str) -> bool:
        """Return whether a checkpoint that was being written has a record, or is gone."""
        return not name or name in self.manager.session.manifest.by_name or not (self._folder / name).is_dir()

    def _chosen(self, step: int, saved: Mapping[str, Any]) -> str:
        """Return the name of the checkpoint that was resumed from, if a person chose it: if its run has a newer one."""
        records = self.manager.session.manifest
        record = records.by_name.get(f"checkpoint-{step}")
        if record is None or record.run != saved.get("run"):
            return ""
        is_newest = all(other.step <= step for other in records.records if other.run == record.run)
        return "" if is_newest else record.name

    def _acknowledge(self, state: Any, claim: Claim) -> None:
        """Commit the checkpoint that was resumed from, if its process was killed before it had a record."""
        name, path = claim.writing, self._folder / claim.writing
        if name in self.manager.session.manifest.by_name or not path.is_dir():
            return
        if problem_of(path, ranks=claim.ranks) is not None:
            return
        metrics = logged_at(state, state.global_step)
        now = observation(metrics, state, self._training.clock, epoch_end=ends_epoch(state))
        decision = self._decide(now, "its process was killed before the record was written")
        if isinstance(decision, Save):
            self._state, self._final = state, _named(decision, name)
            self._adopt()

    def _claim(self, writing: str = "", state: Mapping[str, Any] = MappingProxyType({})) -> None:
        ranks, self._is_writing = self._training.ranks.size, bool(writing)
        claim = Claim(owner=self._owner, term=self._term, writing=writing, ranks=ranks, state=dict(state))
        claim.put(self._storage)

    # Deciding

    def _decide(self, now: Observation, due: str) -> Decision:
        return self.manager.session.decide(now.metrics, now.step, now.epoch, epoch_end=now.epoch_end, due=due)

    def report(self, now: Observation) -> Decision:
        """Decide, and prepare the folder for a `Save`."""
        decision = self._decide(now, self._training.due)
        if not isinstance(decision, Save):
            return decision
        promoted = self._promote(decision)
        if promoted is not None:
            return promoted
        why = self._doubtful.get(f"checkpoint-{now.step}", "")
        if why and not self._training.due:
            return Skip(reason=f"checkpoint-{now.step}: {why}, so the next step is saved", due=True)
        return self._prepare(decision)

    def report_written(self, now: Observation) -> Decision:
        """Decide on a checkpoint that the Trainer has written, although the policy did not ask for it."""
        name = f"checkpoint-{now.step}"
        if name in self.manager.session.manifest.by_name:
            return Skip(reason=f"{name} is saved already, and was written over")
        decision = self._decide(now, self._training.due)
        return _named(decision, name) if isinstance(decision, Save) else decision

    def rescue(self, now: Observation, reason: str) -> Decision:
        """Decide on a rescue of this step, unless it is saved already."""
        manifest = self.manager.session.manifest
        saved = manifest.at_step(now.step)
        if saved is not None:
            return Skip(reason=f"step {now.step} is saved already as {saved.name}")
        return self._prepare(decide_rescue(self.manager.policy, now, manifest, reason))

    def _prepare(self, decision: Save) -> Save:
        """Free the name that the Trainer will write to, and claim it.

        A checkpoint beyond this step is another run's, or abandoned, and the Trainer would resume from it.
        """
        step, session = decision.observation.step, self.manager.session
        self._term = session.hold()
        for other in checkpoints_of(self._folder):
            if (step_of(other) or 0) >= step:
                session.make_way(other)
        self._claim(f"checkpoint-{step}", session.state_dict(decision))
        session.hold()  # A process that takes over after this look reads the claim.
        return _named(decision, f"checkpoint-{step}")

    def _promote(self, decision: Save) -> Skip | None:
        """Let the rescue of this step count as the regular checkpoint that a rule wants now, without writing it again.

        This happens if a resume runs an evaluation that a signal had left out, for example. A second write would
        first take the name from a committed checkpoint.
        """
        session, now = self.manager.session, decision.observation
        rescued = next((r for r in session.manifest.live if r.kind == "rescue" and r.step == now.step), None)
        if rescued is None:
            return None
        merged = attrs.evolve(now, metrics={**rescued.metrics, **now.metrics})
        retire = tuple(name for name in decision.retire if name != rescued.name)
        regular = attrs.evolve(_named(decision, rescued.name), observation=merged, retire=retire)
        session.commit(regular, self._folder / rescued.name)
        return Skip(reason=f"{rescued.name} was a rescue; {decision.reason}", due=True)

    # Committing

    def commit(self, decision: Save, now: Observation, *, state: Any, optimizer: Any, is_written: bool) -> Decision:
        """Carry out a decision, with what was measured since."""
        self._state, self._optimizer = state, optimizer
        self._final = marked(self._completed(decision, now), [optimizer])
        return self._adopt() if is_written else self.manager.session.commit(self._final)

    def _completed(self, decision: Save, now: Observation) -> Save:
        before = decision.observation
        if decision.kind == "rescue" or before.metrics.keys() == now.metrics.keys():
            return decision
        again = self._decide(now, self._training.due)
        if isinstance(again, Save):
            return _named(again, decision.name)
        return attrs.evolve(decision, observation=attrs.evolve(before, metrics={**before.metrics, **now.metrics}))

    def _adopt(self) -> Decision:
        """Commit what the Trainer has written under its final name."""
        path, session = self._folder / self._final.name, self.manager.session
        refuse_shards(path, self._optimizer)
        session.hold()
        try:
            self._write_state(path)
        except OSError:
            session.hold()  # A process that took over has renamed it.
            raise
        done = session.commit(self._final, path)
        self._claim()
        return done

    def _save(self, path: str) -> None:
        """Let every rank write to a staged path; the manager calls this."""
        self._training.team.call("write", path)
        # The Trainer has written a folder of the final name into this one, and every rank has finished.
        parent = staging_parent(path)
        os.rename(os.path.join(parent, self._final.name), path)
        os.rmdir(parent)
        refuse_shards(Path(path), self._optimizer)
        self._write_state(Path(path))

    def _write_state(self, path: Path) -> None:
        """Write the Trainer's state into the checkpoint again, as it will be once that is committed."""
        session = self.manager.session
        best = best_of(self.manager.policy, session.after(self._final))
        show_best(best, self._state, self._training.output_dir)
        save_state(self._state, session.state_dict(self._final), owes=self._training.owes_evaluation)
        staged = path / f"{STATE_FILE}.new"
        self._state.save_to_json(str(staged))
        os.replace(staged, path / STATE_FILE)


def _needs_metric(policy: Policy) -> bool:
    """Return whether nothing is saved without a metric."""
    keys = [rule.metric.key if isinstance(rule, KeepBest) else "step" for rule in policy.rules]
    return not policy.last and all(isinstance(key, str) and key not in ("epoch", "step") for key in keys)


def _named(decision: Save, name: str) -> Save:
    return attrs.evolve(decision, name=name, replaces=False)


def staging_parent(path: str) -> str:
    """Return the folder in which the Trainer stages the checkpoint that belongs at ``path``."""
    return f"{path}-in"
