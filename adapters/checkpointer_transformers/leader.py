"""Rank 0's part in one training: it decides, commits, and writes the claim."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import attrs

from checkpointer import CheckpointManager, Decision, Observation, Progress, Save, Skip
from checkpointer.policy.decide import decide_rescue
from checkpointer.policy.swapped_weights import marked
from checkpointer.ports import SupportsSweep
from checkpointer.storage import open_storage
from checkpointer.storage.owner import new_owner, release
from checkpointer_transformers.integrity import STATE_FILE, checkpoints_of, problem_of, refuse_shards, step_of
from checkpointer_transformers.lock import Claim
from checkpointer_transformers.trainer_state import (
    best_of,
    ends_epoch,
    logged_at,
    observation,
    save_state,
    saved_state,
    show_best,
)

if TYPE_CHECKING:
    from checkpointer_transformers.training import Training


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


def _named(decision: Save, name: str) -> Save:
    return attrs.evolve(decision, name=name, replaces=False)


def staging_parent(path: str) -> str:
    """Return the folder in which the Trainer stages the checkpoint that belongs at ``path``."""
    return f"{path}-in"
