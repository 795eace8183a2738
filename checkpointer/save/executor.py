"""Executes decisions in the loop or on the writer thread, and reports in the loop how they ended."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, Final

import attrs

from checkpointer.errors import ConflictError, SaveError, warn
from checkpointer.formats.snapshot import Snapshots
from checkpointer.formats.torch_file import TorchFormat
from checkpointer.policy.decide import Attach, Decision, Save, Skip
from checkpointer.policy.schedule import Schedule
from checkpointer.policy.swapped_weights import marked, ranking_doubt, states_in
from checkpointer.ports import Clock, Snapshotting, SupportsSnapshots, Taken
from checkpointer.records.manifest import Manifest
from checkpointer.save.background import Background, Busy, Job, Outcome, copies_of
from checkpointer.save.saver import Saver
from checkpointer.save.writer_process import WriterProcess
from checkpointer.storage.opening import access_advice

_log: Final = logging.getLogger("checkpointer")


class KeepAlive:
    """Garbage-collected when neither a manager nor an unfinished save refers to it: then the owner is released."""


@attrs.define
class SaveExecutor:
    """Takes the state, writes it in the loop or in the background, and handles failures."""

    saver: Saver
    schedule: Schedule
    clock: Clock
    capture: Callable[[], Any] | None
    """Returns the state or the weights; None if a trainer writes its checkpoints itself."""
    tolerated: int
    """How many saves in a row may fail with a warning."""
    busy: Busy | None
    """What the writer thread does if a save is due while another is unfinished; None if the loop writes."""
    keep_alive: KeepAlive
    background: Background | None = attrs.field(default=None, init=False)
    """Writes on its thread; None if the loop writes."""
    snapshots: Snapshotting = attrs.field(init=False)
    """Copies what the background writes."""
    process: WriterProcess | None = attrs.field(default=None, init=False)
    """Writes large snapshots in place of the thread."""
    saving: Save | None = attrs.field(default=None, init=False)
    """The save whose state is being taken: a host's state that contains ours is taken as if it were done."""
    saved_steps: set[int] = attrs.field(factory=set, init=False)
    """Steps that were saved, also if their checkpoint is retired by now."""
    reported: frozenset[str] = attrs.field(default=frozenset(), init=False)
    """Names of the metrics that were reported so far."""
    _failures: int = attrs.field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        if self.busy is not None:
            directory, format = self.saver.directory, self.saver.format
            self.background = Background(self.busy, lambda: directory.manifest, self.schedule.wake)
            snapshots = format.snapshots if isinstance(format, SupportsSnapshots) else Snapshots
            self.snapshots = snapshots(copies_of(self.busy))
            self.process = WriterProcess(format) if type(format) is TorchFormat else None

    def outlook(self) -> Manifest:
        """Return the records as they will be once every unfinished save is done."""
        directory = self.saver.directory
        if self.background is None:
            directory.contents.note(self.reported)
            return directory.manifest
        manifest = self.background.outlook(directory.policy)
        seen = manifest.seen | self.reported
        return manifest if seen == manifest.seen else attrs.evolve(manifest, seen=seen)

    def execute(self, decision: Save, path: str | os.PathLike[str] | None = None, *, at_once: bool = False) -> Decision:
        """Carry out a save; return it, or a `Skip` if it failed and the failure is tolerated.

        The payload is the one that a trainer has written to ``path``, or the state. With ``at_once`` the loop writes
        it; then no other save may be unfinished. Raises `SaveError` if this save or an earlier one failed.
        """
        if not at_once:
            if self.background is not None and path is None and not self.background.is_here:
                return self._submit(decision, self.background)
            self.settle()
            self.collect()
        with self._as_if_done(decision):
            state = self._take_state() if path is None and self.saver.save is None else None
            decision = self._marked(decision, state)
            try:
                self.saver.directory.contents.note(self.reported)
                record = self.saver.write(decision, state) if path is None else self.saver.adopt(decision, path)
            except ConflictError:
                raise
            except Exception as error:  # After any error the older checkpoints are still there.
                self._answer(decision)
                return self._failed(decision, error)
            self._failures = 0
            self._answer(decision, is_saved=True)
            return attrs.evolve(decision, name=record.name, retire=self.saver.finish(record))

    def _submit(self, decision: Save, background: Background) -> Decision:
        """Copy the state and let the writer thread write it."""
        self.saved_steps.difference_update(background.make_room(decision.observation.step))
        self.collect()
        with self._as_if_done(decision):
            state = self._take_state()
        decision = self._marked(decision, state)
        snapshot: Taken | None = None
        try:
            # In the loop, once, because it may rename a slot that the next decisions refer to.
            self.saver.directory.begin()
            snapshot = self.snapshots.take(state)
            work = functools.partial(self._write_snapshot, snapshot, self.reported)
            background.submit(Job(decision, work, snapshot.release))
        except ConflictError:
            raise
        except Exception as error:
            if snapshot is not None:
                snapshot.release()
            self._answer(decision)
            return self._failed(decision, error)
        self._answer(decision, is_saved=True)
        return decision

    def _write_snapshot(self, snapshot: Taken, reported: frozenset[str], job: Job) -> None:
        assert isinstance(job.decision, Save), "only a save has a snapshot"
        try:
            self.saver.directory.contents.note(reported)
            by = self.process.write if self.process is not None else None
            record = self.saver.write(job.decision, snapshot.wait(), by=by)
            job.is_saved = True
        finally:
            snapshot.release()
        self.saver.finish(record)

    def attach(self, decision: Attach) -> Attach | Skip:
        """Add new metrics to a saved step, after the unfinished saves; return a `Skip` if a failure is tolerated."""
        try:
            if self.background is None or self.background.is_here:
                self.saver.attach(decision)
                return decision
            self.saver.directory.begin()
            try:
                self.background.submit(Job(decision, lambda job: self.saver.attach(decision), lambda: None))
            except RuntimeError:  # The thread cannot be started.
                self.settle()
                self.saver.attach(decision)
        except ConflictError:
            raise
        except OSError as error:
            return self._failed(decision, error)
        return decision

    def _take_state(self) -> Any:
        if self.capture is None:
            msg = "nothing to save: pass state= (or save=) to CheckpointManager, or a path to commit()"
            raise SaveError(msg)
        return self.capture()

    def _marked(self, decision: Save, state: Any) -> Save:
        """If the state has weights that no validation measures, add that to the reason."""
        directory, decision = self.saver.directory, marked(decision, states_in(state))
        if doubt := ranking_doubt(decision, directory.policy.known_metrics):
            directory.contents.warn_once("swapped weights", doubt)
        return decision

    @contextlib.contextmanager
    def _as_if_done(self, decision: Save) -> Iterator[None]:
        self.saving = decision
        try:
            yield
        finally:
            self.saving = None

    def _answer(self, decision: Save, *, is_saved: bool = False) -> None:
        """Count a due point as answered, even if the write failed: the next one is another."""
        if decision.kind == "regular" and is_saved:
            self.saved_steps.add(decision.observation.step)
        self.schedule.take(decision, decision.observation, self.clock.time())

    def _failed(self, decision: Save | Attach, error: BaseException) -> Skip:
        """Warn about a failure if it is tolerated, else raise it; if another process has taken over, raise that."""
        try:
            self.saver.directory.journal.check_term()
        except ConflictError as fenced:
            raise fenced from error
        except OSError:
            _log.debug("whether another process has taken over is not known: the storage fails")
        self._failures += 1
        is_save = isinstance(decision, Save)
        what = "was not saved" if is_save else "did not get its new metrics"
        msg = f"{decision.name} {what} ({type(error).__name__}: {error}); older checkpoints are untouched"
        if isinstance(error, PermissionError):
            msg += f"; {access_advice(self.saver.directory.storage, error)}"
        if self._failures > self.tolerated or not isinstance(error, Exception):
            raise error if isinstance(error, SaveError) else SaveError(msg) from error
        tolerated = f"{msg}; failure {self._failures} of {self.tolerated} tolerated"
        warn(tolerated)
        return Skip(reason=msg, due=is_save)

    def settle(self, timeout: float | None = None) -> bool:
        """Wait up to ``timeout`` seconds until no save is unfinished; return whether that is so. None has no limit.

        Failures are raised later, by `collect`.
        """
        return self.background is None or self.background.wait(timeout)

    @property
    def unfinished(self) -> str:
        """Names of the checkpoints that are being written, for a message."""
        return ", ".join(self.background.status.unfinished) if self.background is not None else ""

    def collect(self) -> None:
        """Collect how the saves in the background ended; raise the failure of one, if it is not tolerated."""
        if self.background is None or self.background.is_here:
            return
        self.schedule.calm()
        try:
            while (outcome := self.background.collect()) is not None:
                self._take_in(outcome)
        except BaseException:
            self.schedule.wake()  # More outcomes may be left.
            raise

    def _take_in(self, outcome: Outcome) -> None:
        error, decision = outcome.error, outcome.decision
        if error is None:
            self._failures = 0 if isinstance(decision, Save) else self._failures
        elif isinstance(error, ConflictError):
            raise error
        elif outcome.is_saved:
            msg = f"{decision.name} is saved, but a step after it failed ({type(error).__name__}: {error})"
            raise SaveError(msg) from error
        else:
            if isinstance(decision, Save):
                self.saved_steps.discard(decision.observation.step)
            self._failed(decision, error)
