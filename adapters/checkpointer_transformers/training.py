"""One training, from its begin to its end: rank 0 decides and commits, and every rank knows what it has to."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import attrs

from checkpointer import CheckpointerWarning, CheckpointManager, Decision, KeepBest, Observation, Policy, Progress, Save
from checkpointer.clock import SystemClock
from checkpointer.distributed.ranks import Agreement, Team
from checkpointer.policy.decide import Skip, decide_rescue
from checkpointer.policy.swapped_weights import marked
from checkpointer.policy.triggers import Horizon
from checkpointer.ports import Clock, Ranks, Storage, SupportsSweep
from checkpointer.storage import open_storage
from checkpointer.storage.owner import new_owner, release
from checkpointer_transformers.integrity import checkpoints_of, problem_of, step_of
from checkpointer_transformers.lock import Claim
from checkpointer_transformers.trainer_state import (
    Best,
    best_of,
    epoch_of,
    finished_epochs,
    logged_at,
    owes_evaluation,
    saved_state,
    write_state,
)

__all__ = ["Training", "as_written"]

Phase = Literal["between", "forward", "stepping"]
"""Where the training is: between two steps, in the passes, or where weights and optimizer do not belong together."""

ASKED = "another callback asked for it"


def as_written(policy: Policy) -> Policy:
    """Return the policy with the names that the Trainer gives: folders called ``checkpoint-<step>``."""
    naming = attrs.evolve(
        policy.name, template="checkpoint-{step}", auto_insert=False, join="-", extension="", version_counter=True
    )
    return attrs.evolve(policy, name=naming)


@attrs.frozen
class _Broadcast:
    """What rank 0 tells the others."""

    decision: Decision
    horizon: Horizon
    best: Best | None
    saved: bool
    """Whether the step is saved."""


class Training:
    """What lives while ``Trainer.train`` runs, on every rank.

    Args:
        folder: Where the Trainer writes.
        policy: The policy as `as_written`.
        ranks: The processes.
        output_dir: The folder as the Trainer has it.
        options: What `CheckpointManager` takes besides.
        clock: Where rank 0 has the time from.
    """

    def __init__(
        self,
        folder: Path,
        policy: Policy,
        ranks: Ranks,
        *,
        output_dir: str,
        options: Mapping[str, Any],
        clock: Clock | None = None,
    ) -> None:
        self.folder, self.policy, self.ranks, self.output_dir = folder, policy, ranks, output_dir
        self.phase: Phase = "between"
        self.pending: Save | None = None
        self.stopping = False
        """Whether a rescue ended the training."""
        self.owes_evaluation = False
        """Whether a signal left out the evaluation of this step, or ended it."""
        self._saved_step = -1
        self._ended_step = -1
        self._final: Save | None = None
        self.manager: CheckpointManager | None = None
        self.ended = False
        """Whether the end of the training was seen."""
        self.failing = False
        """Whether a save is under way, or has failed."""
        self.write: Callable[[str], None] | None = None
        """Lets the Trainer write to a staged path, while it wants to."""
        self._options = options
        self._clock = clock or SystemClock()
        self._agreement = Agreement(ranks)
        self._team = Team(ranks, {"write": self._write})
        self._metrics: tuple[int, dict[str, Any]] = (-1, {})
        self._due = ""
        self._owner = new_owner()
        self._storage: Storage | None = None
        self._state: Any = None
        self._closed = False
        self._held_back = False
        """Whether the last log had values that were not taken."""
        self._patient = not policy.last and all(_needs_metric(rule) for rule in policy.rules)

    # From begin to end

    def state_dict(self) -> dict[str, Any]:
        """Return what a training that takes this one's place goes on from; empty but on rank 0."""
        return {} if self.manager is None else self.manager.session.state_dict()

    def open(self, state: Any, again: Mapping[str, Any]) -> None:
        """Open the folder, and go on with the run that the Trainer resumed, or with one that it begins ``again``."""
        self.owes_evaluation = owes_evaluation(state)

        def open_it() -> _Broadcast:
            self._storage = open_storage(self.folder, self._owner)
            self.manager = manager = CheckpointManager(
                self.folder, self.policy, save=self._save, clock=self._clock, **self._options
            )
            step = state.global_step
            saved = saved_state(state) or self._claimed(step) if step else _from_start(again, self._clock)
            if saved:
                manager.session.load_state_dict(saved, source=self._chosen(state.global_step, saved))
                self._acknowledge(state, saved)
            self._claim()
            return self._tell(Skip(reason="the training begins"), state)

        self._heed(self._team.work(open_it), state)

    def _chosen(self, step: int, saved: Mapping[str, Any]) -> str:
        """Return the name of what was resumed from, if somebody chose it: it is not the newest of its run."""
        assert self.manager is not None, "this is rank 0"
        name = f"checkpoint-{step}"
        record = self.manager.session.manifest.by_name.get(name)
        if record is None or record.run != saved.get("run"):
            return ""
        later = [
            other for other in self.manager.session.manifest.records if other.run == record.run and other.step > step
        ]
        return name if later else ""

    def close(self, *, timeout: float | None = None) -> None:
        """Give the folder free, and wait as `CheckpointManager.close` does. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self.manager is not None:
            self.manager.close(timeout=timeout)
        if isinstance(self._storage, SupportsSweep):
            self._storage.close()
        release(self._owner)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

    # Asking whether there is anything to say

    def is_quiet(self, state: Any, epochs: int) -> bool:
        """Return whether neither the step nor the count of whole epochs can be due; alike on every rank."""
        horizon = self._horizon
        return bool(state.global_step < horizon.step and epochs < horizon.epochs)

    def is_saved(self, state: Any) -> bool:
        """Return whether the step is saved, and takes what is measured now."""
        return bool(self._saved_step == state.global_step)

    def epochs(self, state: Any) -> int:
        """Return how many epochs have ended, as far as the Trainer has said so."""
        return epoch_of(state) + bool(self._ended_step == state.global_step)

    def is_waiting(self) -> bool:
        """Return whether a report without metrics is in vain: what is due waits for one."""
        return self._patient and self._waiting

    def agreed(self, *, flag: bool, attached: bool) -> bool:
        """Return whether the clock, or ``flag`` on any rank, calls for a report; the ranks talk seldom."""
        timed = self._horizon.time
        if timed == float("inf"):
            return self._agreement(flag) if attached else False
        # Clocks differ: rank 0's counts.
        return self._agreement(flag or (self.ranks.rank == 0 and self._clock.time() >= timed))

    def measured(self, step: int, metrics: Mapping[str, Any], *, anew: bool) -> bool:
        """Take in what was measured at this step; return whether there is a name that was not there.

        A value that the step was ranked by stays, unless it was measured ``anew``, by an evaluation: what is logged
        later under the same name, such as the mean of an epoch, is another quantity. Names alone decide what is
        returned, so it is the same on every rank.
        """
        before = self._at(step)
        is_ranked = self._saved_step == step or self.pending is not None
        held_back = metrics.keys() & before.keys() if is_ranked and not anew else set()
        is_new = self._held_back if anew else False
        self._held_back = bool(held_back)
        taken = {name: value for name, value in metrics.items() if name not in held_back}
        self._metrics = step, {**before, **taken}
        return is_new or not metrics.keys() <= before.keys()

    # Deciding

    def report(self, state: Any, *, epoch_end: bool = False, due: str = "") -> Decision:
        """Let rank 0 decide on what is known of this step, and prepare what it decided."""
        self._due = due
        self._ended_step = state.global_step if epoch_end else self._ended_step

        def decide() -> _Broadcast:
            decision = self._decide(state, due)
            if isinstance(decision, Save):
                promoted = self._promoted(decision)
                decision = self._prepared(decision) if promoted is None else promoted
            return self._tell(decision, state)

        return self._heed(self._team.work(decide), state)

    def report_written(self, state: Any) -> Decision:
        """Let rank 0 decide on what the Trainer has written unasked."""
        self._due = ASKED

        def decide() -> _Broadcast:
            name = f"checkpoint-{state.global_step}"
            if name in self._own_manager.session.manifest.by_name:
                return self._tell(Skip(reason=f"{name} is saved already, and was written over"), state)
            decision = self._decide(state, ASKED)
            if isinstance(decision, Save):
                decision = attrs.evolve(decision, name=name, replaces=False)
            return self._tell(decision, state)

        return self._heed(self._team.work(decide), state)

    def rescue(self, state: Any, why: str) -> Decision:
        """Decide on a rescue of this step, unless it is saved already."""

        def decide() -> _Broadcast:
            manager = self._own_manager
            saved = manager.session.manifest.at_step(state.global_step)
            if saved is not None:
                return self._tell(Skip(reason=f"step {state.global_step} is saved already as {saved.name}"), state)
            decision = decide_rescue(self.policy, self._now(state), manager.session.manifest, why)
            return self._tell(self._prepared(decision), state)

        return self._heed(self._team.work(decide), state)

    def _decide(self, state: Any, due: str) -> Decision:
        step = state.global_step
        ended = self._ended_step == step
        return self._own_manager.session.decide(self._at(step), step, epoch_of(state), epoch_end=ended, due=due)

    def _at(self, step: int) -> dict[str, Any]:
        return self._metrics[1] if self._metrics[0] == step else {}

    def _now(self, state: Any) -> Observation:
        step = state.global_step
        return Observation(
            metrics=self._at(step),
            step=step,
            epoch=epoch_of(state),
            epoch_end=self._ended_step == step,
            time=self._clock.time(),
        )

    def _prepared(self, decision: Save) -> Save:
        """Make the name free that the Trainer will write to, and say that it does.

        What lies beyond this step is another run's, or abandoned: the Trainer would resume from it.
        """
        name = f"checkpoint-{decision.observation.step}"
        for other in checkpoints_of(self.folder):
            if (step_of(other) or 0) >= decision.observation.step:
                self._own_manager.session.make_way(other)
        if self.write is None:
            self._claim(name, self._own_manager.session.state_dict(decision))
        return attrs.evolve(decision, name=name, replaces=False)

    def _promoted(self, decision: Save) -> Skip | None:
        """Let the rescue of this step count as the regular checkpoint that a rule wants now, without writing it again.

        A resume evaluated what a signal had left out, for example. To write it again would first take the name from a
        checkpoint that is acknowledged.
        """
        manager, now = self._own_manager, decision.observation
        rescued = next((r for r in manager.session.manifest.live if r.kind == "rescue" and r.step == now.step), None)
        if rescued is None:
            return None
        whole = attrs.evolve(now, metrics={**rescued.metrics, **now.metrics})
        retire = tuple(name for name in decision.retire if name != rescued.name)
        regular = attrs.evolve(decision, name=rescued.name, observation=whole, retire=retire, replaces=False)
        manager.session.commit(regular, self.folder / rescued.name)
        return Skip(reason=f"{rescued.name} was a rescue; {decision.reason}", due=True)

    def _claim(self, writing: str = "", state: Mapping[str, Any] = MappingProxyType({})) -> None:
        assert self._storage is not None, "this is rank 0"
        Claim(owner=self._owner, writing=writing, ranks=self.ranks.size, state=dict(state)).put(self._storage)

    def _claimed(self, step: int) -> Mapping[str, Any]:
        """Return the manager's state that a claim has of the checkpoint of this step; empty if it has none."""
        assert self._storage is not None, "this is rank 0"
        claim = Claim.of(self._storage)
        return claim.state if claim.writing == f"checkpoint-{step}" else {}

    # Committing

    def commit(self, state: Any, optimizer: Any, *, written: bool) -> Decision:
        """Carry out what is pending; ``written``: the Trainer has written it under its final name, on this rank."""
        self._state, decision, self.pending = state, self.pending, None
        assert decision is not None, "something is pending"
        if written and self.ranks.size > 1:
            self.ranks.gather(None)  # Another rank may still be writing.

        def commit() -> _Broadcast:
            self._final = final = marked(self._completed(state, decision), [optimizer])
            if not written:
                return self._tell(self._own_manager.session.commit(final), state)
            return self._tell(self._adopt(final), state)

        done = self._heed(self._team.work(commit), state)
        self.pending = None
        return done

    def _adopt(self, final: Save) -> Decision:
        """Commit what the Trainer has written under its final name."""
        path = self.folder / final.name
        self._write_state(path, final)
        done = self._own_manager.session.commit(final, path)
        self._claim()
        return done

    def _acknowledge(self, state: Any, saved: Mapping[str, Any]) -> None:
        """Commit what the Trainer resumed from, if the process that wrote it was killed before it had a record."""
        assert self._storage is not None, "this is rank 0"
        claim, step, name = Claim.of(self._storage), state.global_step, f"checkpoint-{state.global_step}"
        is_acknowledged = name in self._own_manager.session.manifest.by_name
        if claim.writing != name or claim.state.get("run") != saved.get("run") or is_acknowledged:
            return
        if not (self.folder / name).is_dir() or problem_of(self.folder / name, ranks=claim.ranks) is not None:
            return
        is_whole, due = finished_epochs(state) > epoch_of(state), "its process was killed before the record was written"
        logged = logged_at(state, step)
        decision = self._own_manager.session.decide(logged, step, epoch_of(state), epoch_end=is_whole, due=due)
        if isinstance(decision, Save):
            self._state = state
            self._adopt(attrs.evolve(decision, name=name, replaces=False))

    def _completed(self, state: Any, decision: Save) -> Save:
        """Return the decision with what was measured since."""
        before, now = decision.observation, self._at(decision.observation.step)
        if decision.kind == "rescue" or before.metrics.keys() == now.keys():
            return decision
        again = self._decide(state, self._due)
        if isinstance(again, Save):
            return attrs.evolve(again, name=decision.name, replaces=False)
        return attrs.evolve(decision, observation=attrs.evolve(before, metrics={**before.metrics, **now}))

    def _save(self, path: str) -> None:
        """Let every rank write to a staged path: what the manager calls, on rank 0."""
        self._team.call("write", path)
        assert self._final is not None, "it is being committed"
        # The Trainer has put it into a folder of its name, and every rank is done with it.
        os.rename(os.path.join(holder_of(path), self._final.name), path)
        os.rmdir(holder_of(path))
        self._write_state(Path(path), self._final)

    def _write_state(self, path: Path, decision: Save) -> None:
        owes, manager = self.owes_evaluation, self._own_manager
        write_state(self._state, path, manager, decision, output_dir=self.output_dir, owes=owes)

    def _write(self, path: str) -> None:
        assert self.write is not None, "the Trainer wants to write"
        self.write(path)

    # Telling

    @property
    def _own_manager(self) -> CheckpointManager:
        assert self.manager is not None, "this is rank 0"
        return self.manager

    def _tell(self, decision: Decision, state: Any) -> _Broadcast:
        manager = self._own_manager
        saved = manager.session.manifest.at_step(state.global_step) is not None
        return _Broadcast(decision, manager.session.horizon, best_of(manager.policy, manager.session.manifest), saved)

    def _heed(self, told: _Broadcast, state: Any) -> Decision:
        self._horizon = told.horizon
        decision = told.decision
        self._saved_step = state.global_step if told.saved else -1
        self._waiting = isinstance(decision, Skip) and bool(decision.waiting)
        self.pending = decision if isinstance(decision, Save) else self.pending
        if told.best is not None:
            told.best.show(state, self.output_dir)
        return decision

    def warn_of_stranger(self, state: Any) -> None:
        """Say that the Trainer has written something that no rule asked for."""
        msg = (
            f"checkpoint-{state.global_step} was written because another callback set should_save after this one, and "
            "the policy did not ask for it: it is neither ranked nor removed, and if it was there before, its record "
            "fits it no longer. Put CheckpointCallback behind that callback, or attach(trainer)"
        )
        warnings.warn(msg, CheckpointerWarning, stacklevel=3)


def _from_start(again: Mapping[str, Any], clock: Clock) -> Mapping[str, Any]:
    """Return the state of a run that begins anew."""
    since = attrs.asdict(Progress(time=clock.time()))
    return {**again, "step": 0, "since": since, "owed": ""} if again else {}


def _needs_metric(rule: object) -> bool:
    return isinstance(rule, KeepBest) and isinstance(rule.metric.key, str) and rule.metric.key not in ("epoch", "step")


def holder_of(path: str) -> str:
    """Return the folder in which the Trainer stages the checkpoint that belongs at ``path``."""
    return f"{path}-in"


def folder_of(output_dir: str) -> Path:
    """Return the folder, whatever ``chdir`` comes later."""
    return Path(os.path.abspath(os.path.expanduser(output_dir)))
