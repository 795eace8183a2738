"""Carries decisions out, in the loop or on the writer thread, and hears in the loop what became of them there."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import attrs

from checkpointer.errors import AliasInUseError, CheckpointerWarning, SaveError
from checkpointer.policy.decide import Attach, Decision, Save, Skip
from checkpointer.policy.schedule import Schedule
from checkpointer.policy.swapped_weights import marked, ranking_doubt, states_in
from checkpointer.ports import Clock, Snapshotting, Taken
from checkpointer.records.manifest import Manifest
from checkpointer.records.record import Observation
from checkpointer.save.background import Background, Job, Outcome
from checkpointer.save.saver import Saver
from checkpointer.storage.opening import access_advice

__all__ = ["Life", "SaveExecutor"]


class Life:
    """Its end is the end of a manager that nobody closed: what is still under way holds on to it too."""


@attrs.define
class SaveExecutor:
    """What lies between a decision and its effects: taking the state, writing it here or behind, failing."""

    saver: Saver
    pacing: Schedule
    clock: Clock
    capture: Callable[[], Any] | None
    """Returns the state, or the weights; None if there is nothing to take, or a trainer writes by itself."""
    tolerated: int
    """How many saves in a row may fail with a warning."""
    background: Background | None
    """Writes on its thread; None if all is written in the loop."""
    snapshots: Snapshotting | None
    """Copies what is written behind the loop."""
    life: Life
    saving: Save | None = attrs.field(default=None, init=False)
    """What is being saved while the state is taken: a host's state that holds ours is taken as if it were done."""
    saved_steps: set[int] = attrs.field(factory=set, init=False)
    """Steps that were saved, whatever was retired since."""
    reported: frozenset[str] = attrs.field(default=frozenset(), init=False)
    """Names of the metrics that were reported so far."""
    _failures: int = attrs.field(default=0, init=False)

    def outlook(self) -> Manifest:
        """Return the records as they will be once every save that is under way is done."""
        directory = self.saver.directory
        if self.background is None:
            directory.note(self.reported)
            return directory.manifest
        manifest = self.background.outlook(directory.policy)
        seen = manifest.seen | self.reported
        return manifest if seen == manifest.seen else attrs.evolve(manifest, seen=seen)

    def look_before_declining(self, now: Observation) -> bool:
        """Set aside what is gone, if the observation is declined for it; return whether it is.

        Not while a save or late metrics are under way: the writer thread changes the records then, and looks itself
        before it retires anything.
        """
        if self.background is not None and not self.background.wait(0):
            return False
        return self.saver.directory.look_before_declining(now)

    # Carrying out

    def execute(self, decision: Save, path: str | os.PathLike[str] | None = None, *, at_once: bool = False) -> Decision:
        """Carry out a save, here or on the writer thread; return it, or a `Skip` if it failed and that is tolerated.

        Args:
            decision: The save.
            path: Where a trainer has written the payload; None takes the state.
            at_once: Write it here in any case. Nothing else may be under way.

        Raises:
            SaveError: If it could not be written, or an earlier one could not.
        """
        if not at_once:
            if self.background is not None and path is None and not self.background.is_here:
                return self._hand_over(decision, self.background)
            self.settle()
            self.hear()
        with self._as_if_done(decision):
            state = self._take_state() if path is None and self.saver.save is None else None
            decision = self._marked(decision, state)
            try:
                self.saver.directory.note(self.reported)
                record = self.saver.write(decision, state, path)
            except AliasInUseError:
                raise
            except Exception as error:  # Whatever went wrong with the write, older checkpoints are still there.
                self._answer(decision)
                return self._failed(decision, error)
            self._failures = 0
            self._answer(decision, is_saved=True)
            return attrs.evolve(decision, name=record.name, retire=self.saver.finish(record))

    def _hand_over(self, decision: Save, background: Background) -> Decision:
        """Copy the state and have it written: the decision is carried out, or the loop will hear why not."""
        assert self.snapshots is not None, "they come with the background"
        self.saved_steps.difference_update(background.make_room(decision.observation.step))
        self.hear()
        with self._as_if_done(decision):
            state = self._take_state()
        decision = self._marked(decision, state)
        snapshot: Taken | None = None
        try:
            # Here, once: it may move a slot, which decisions have to see.
            self.saver.directory.begin()
            snapshot = self.snapshots.take(state)
            background.submit(
                Job(decision, functools.partial(self._write_behind, snapshot, self.reported), snapshot.release)
            )
        except AliasInUseError:
            raise
        except Exception as error:
            if snapshot is not None:
                snapshot.release()
            self._answer(decision)
            return self._failed(decision, error)
        self._answer(decision, is_saved=True)
        return decision

    def _write_behind(self, snapshot: Taken, reported: frozenset[str], job: Job) -> None:
        """Write a snapshot, on the writer thread."""
        assert isinstance(job.decision, Save), "only a save has a snapshot"
        try:
            self.saver.directory.note(reported)
            record = self.saver.write(job.decision, snapshot.wait(), None)
            job.is_saved = True
        finally:
            snapshot.release()
        self.saver.finish(record)

    def attach(self, decision: Attach) -> Attach | Skip:
        """Give a saved step its new metrics, in its turn; return the decision, or a `Skip` if a failure is tolerated.

        Raises:
            SaveError: If the record could not be written.
        """
        try:
            self._attach(decision)
        except AliasInUseError:
            raise
        except OSError as error:
            return self._failed(decision, error)
        return decision

    def _attach(self, decision: Attach) -> None:
        if self.background is None or self.background.is_here:
            self.saver.attach(decision)
            return
        self.saver.directory.begin()
        try:
            self.background.submit(Job(decision, lambda job: self.saver.attach(decision), lambda: None))
        except RuntimeError:  # No thread can be started.
            self.settle()
            self.saver.attach(decision)

    def _take_state(self) -> Any:
        if self.capture is None:
            msg = "nothing to save: pass state= (or save=) to CheckpointManager, or a path to commit()"
            raise SaveError(msg)
        return self.capture()

    def _marked(self, decision: Save, state: Any) -> Save:
        """Return the decision with a reason that says so, if the state has weights that no validation measures."""
        directory, decision = self.saver.directory, marked(decision, states_in(state))
        if doubt := ranking_doubt(decision, directory.policy.known_metrics):
            directory.say_once("swapped weights", doubt)
        return decision

    @contextlib.contextmanager
    def _as_if_done(self, decision: Save) -> Iterator[None]:
        self.saving = decision
        try:
            yield
        finally:
            self.saving = None

    def _answer(self, decision: Save, *, is_saved: bool = False) -> None:
        """Count a due point as answered, whether or not the write succeeds: the next one is another."""
        if decision.kind == "regular" and is_saved:
            self.saved_steps.add(decision.observation.step)
        self.pacing.take(decision, decision.observation, self.clock.time())

    def _failed(self, decision: Save | Attach, error: BaseException) -> Skip:
        """Raise what a failed save raises, or warn of it if that is tolerated."""
        self._failures += 1
        is_save = isinstance(decision, Save)
        what = "was not saved" if is_save else "did not get its new metrics"
        msg = f"{decision.name} {what} ({type(error).__name__}: {error}); older checkpoints are untouched"
        if isinstance(error, PermissionError):
            msg += f"; {access_advice(self.saver.directory.storage, error)}"
        if self._failures > self.tolerated or not isinstance(error, Exception):
            raise error if isinstance(error, SaveError) else SaveError(msg) from error
        tolerated = f"{msg}; failure {self._failures} of {self.tolerated} tolerated"
        warnings.warn(tolerated, CheckpointerWarning, stacklevel=6)
        return Skip(reason=msg, due=is_save)

    # Hearing

    def settle(self, timeout: float | None = None) -> bool:
        """Have nothing under way, so that the directory can be changed from here; failures are heard of later.

        Args:
            timeout: Seconds to wait at most; None waits as long as it takes.

        Returns:
            Whether nothing is under way.
        """
        return self.background is None or self.background.wait(timeout)

    @property
    def unfinished(self) -> str:
        """Names of the checkpoints that are being written, for a message."""
        return ", ".join(self.background.status.unfinished) if self.background is not None else ""

    def hear(self) -> None:
        """Take in how the saves in the background ended; raise for one that failed, if that is not tolerated."""
        if self.background is None or self.background.is_here:
            return
        self.pacing.calm()
        try:
            while (outcome := self.background.hear()) is not None:
                self._take_in(outcome)
        except BaseException:
            self.pacing.wake()  # There may be more to hear.
            raise

    def _take_in(self, outcome: Outcome) -> None:
        error, decision = outcome.error, outcome.decision
        if error is None:
            self._failures = 0 if isinstance(decision, Save) else self._failures
            return
        if not outcome.is_saved:
            if isinstance(decision, Save):
                self.saved_steps.discard(decision.observation.step)
            if isinstance(error, AliasInUseError):
                raise error
            self._failed(decision, error)
            return
        msg = f"{decision.name} is saved, but what comes after it was not done ({type(error).__name__}: {error})"
        raise SaveError(msg) from error
