"""The part of a manager that training frameworks use: it decides and commits at moments that the host chooses."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal

import attrs

from checkpointer.commit.directory import Directory
from checkpointer.commit.payload_names import address
from checkpointer.errors import ClosedError
from checkpointer.mirror.mirror import MirrorThread
from checkpointer.mirror.plan import MirrorStatus
from checkpointer.policy.decide import Attach, Decision, Save, Skip, after, decide
from checkpointer.policy.schedule import Schedule
from checkpointer.policy.swapped_weights import apart_from_saved
from checkpointer.policy.triggers import Horizon
from checkpointer.ports import Clock
from checkpointer.records.manifest import Manifest
from checkpointer.records.record import Observation, Record
from checkpointer.records.status import TrainingStatus
from checkpointer.restore import resume
from checkpointer.restore.fetch import MirrorSnapshot
from checkpointer.restore.load import Restored, verify
from checkpointer.save.background import BackgroundStatus
from checkpointer.save.executor import SaveExecutor

_log: Final = logging.getLogger("checkpointer")


@attrs.define
class Session:
    """Decides, commits and keeps state for a host, such as a Trainer's callback: `CheckpointManager.session`.

    Example:
        >>> from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy
        >>> manager = CheckpointManager(None, Policy(EverySteps(1), [KeepLast(1)]), state=dict)
        >>> decision = manager.session.decide({}, step=1, epoch=0)
        >>> manager.session.commit(decision).name
        'epoch=0-step=1.ckpt'
    """

    _directory: Directory
    _schedule: Schedule
    _executor: SaveExecutor
    _mirror: MirrorThread | None
    _clock: Clock
    _level: int
    """The level at which each decision is logged."""
    is_closed: bool = attrs.field(default=False, init=False)

    @property
    def horizon(self) -> Horizon:
        """The step, epoch and time below which nothing is due: several processes need not communicate until then."""
        return self._schedule.horizon

    @property
    def manifest(self) -> Manifest:
        """The records as this run sees them; before it has saved or restored, as the newest run sees them."""
        return self._directory.lines.view

    @property
    def mirror_status(self) -> MirrorStatus | None:
        """How far the mirror is; None without one. Sends no request."""
        return self._mirror.status if self._mirror is not None else None

    @property
    def background_status(self) -> BackgroundStatus | None:
        """The unfinished work of the writer thread, and its cost for the loop; None without ``background=``."""
        background = self._executor.background
        return background.status if background is not None else None

    @property
    def status(self) -> TrainingStatus:
        """How far the training is. Any thread may ask; sends no request."""
        ahead, executor, mirror = self._schedule.horizon, self._executor, self.mirror_status
        transfer, behind = self._directory.transaction.transfer, mirror.behind if mirror is not None else ()
        sizes = self._directory.manifest.by_name
        return TrainingStatus(
            time=self._clock.time(),
            step=self._schedule.last_step,
            due=ahead.text().removeprefix(" before "),
            due_step=max(ahead.step, 0.0),
            due_time=max(ahead.time, 0.0),
            writing=transfer.name if transfer is not None else executor.unfinished,
            written=transfer.bytes if transfer is not None else 0,
            expected=transfer.expected if transfer is not None else 0,
            mirror=str(self._mirror) if self._mirror is not None else "",
            behind=len(behind),
            behind_bytes=sum(sizes[name].size for name in behind if name in sizes),
            mirror_error=mirror.error[:500] if mirror is not None else "",
        )

    def decide(
        self,
        metrics: Mapping[str, Any],
        step: int,
        epoch: int | None = None,
        *,
        epoch_end: bool | None = None,
        due: str = "",
    ) -> Decision:
        """Decide without writing a payload, for trainers that write at another moment: then `commit` the decision.

        An `Attach` is carried out at once. Arguments and errors as for `observe`.
        """
        self.check_open()
        now = self._schedule.observation(metrics, step, epoch, epoch_end=epoch_end, time=self._clock.time())
        self._executor.collect()
        is_writing = bool(self.background_status and self.background_status.unfinished)
        decision = self._decide(now, due, is_writing=is_writing)
        if isinstance(decision, Attach):
            decision = self._executor.attach(decision)
        if not isinstance(decision, Save):
            self._schedule.take(decision, now, self._clock.time(), is_writing=is_writing)
        _log.log(self._level, "step %d: %s", now.step, decision.reason)
        return decision

    def after(self, decision: Decision) -> Manifest:
        """Return the records as they will be once the decision is carried out."""
        return after(decision, self._executor.outlook())

    def _decide(self, now: Observation, why: str = "", *, is_writing: bool = False) -> Decision:
        manifest = self._executor.outlook()
        if now.step < self._schedule.last_step and manifest.at_step(now.step) is None:
            if now.step in self._executor.saved_steps:
                return Skip(reason=f"step {now.step} was saved, and is retired since")
            self._schedule.refuse(now.step)
        self._executor.reported |= now.metrics.keys()
        if not manifest.seen.issuperset(now.metrics):
            manifest = attrs.evolve(manifest, seen=manifest.seen.union(now.metrics))
        again = functools.partial(
            decide,
            self._directory.policy,
            since=self._schedule.since,
            owed=self._schedule.owed or why,
            is_writing=is_writing,
        )
        decision = again(now, manifest)
        if isinstance(decision, Attach):
            apart, why_apart = apart_from_saved(now, manifest.at_step(now.step))
            if why_apart:
                self._directory.contents.warn_once("swapped weights", why_apart)
                decision = again(apart, manifest)
        # A slot is declined by every rule, and saved only for the alias.
        declined = decision.due if isinstance(decision, Skip) else decision.name in self._directory.policy.aliases
        # While a save is unfinished the writer thread changes the records, and looks itself before it retires.
        may_look = declined and not isinstance(decision, Attach) and self._executor.settle(0)
        if may_look and self._directory.looks.before_declining(now):
            decision = again(now, self._executor.outlook())
        if isinstance(decision, Save) or (isinstance(decision, Skip) and decision.due):
            self._warn_of_absent(now, manifest.seen)
        return decision

    def _warn_of_absent(self, now: Observation, seen: frozenset[str]) -> None:
        # Within the first epoch a metric of its end is not reported yet. After it, the name is probably wrong.
        if not now.metrics or (now.epoch == 0 and not now.epoch_end):
            return
        have = ", ".join(sorted(seen))
        for name in sorted(self._directory.policy.known_metrics - seen - {"epoch", "step"}):
            msg = f"metric {name!r} was not reported at step {now.step} (have: {have}): not ranked until it is"
            self._directory.contents.warn_once(f"absent {name}", msg)

    def commit(self, decision: Decision, path: str | os.PathLike[str] | None = None) -> Decision:
        """Carry out a `Save`.

        Args:
            decision: The result of `decide`. If it is not a `Save`, it is returned as it is.
            path: The checkpoint that a trainer has written inside the directory; it is adopted under that name. None
                takes the state and writes it.

        Returns:
            The `Save` with the names that were retired, or a `Skip` if the write failed and that is tolerated.

        Raises:
            SaveError: If the checkpoint could not be written; older ones are untouched.
        """
        self.check_open()
        if not isinstance(decision, Save):
            return decision
        return self._executor.execute(decision, path)

    def find(self, which: str | int | None = None) -> Record | None:
        """Return the record that `restore` would try first, weights included; None if there is none.

        Nothing changes, and what only the mirror has is not found. Errors as for `restore`.
        """
        self.check_open()
        self._executor.settle()
        return resume.find(which, self._directory)

    def locate(
        self, which: str | int | None = None, *, contents: Literal["full", "any"] = "full"
    ) -> tuple[Record, str] | None:
        """Do as `restore`, but do not load: for a trainer that reads its checkpoints itself, folders too.

        Arguments and errors as for `restore`. Files without a record are ignored.

        Returns:
            The record of a whole checkpoint, and its path or URL; None if there is no record.

        Example:
            >>> import tempfile
            >>> from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy
            >>> folder = tempfile.mkdtemp()
            >>> with CheckpointManager(folder, Policy(EverySteps(1), [KeepLast(1)]), state=dict) as manager:
            ...     decision = manager.observe({}, step=1, epoch=0)
            >>> record, path = CheckpointManager(folder).session.locate()
            >>> record.step, path.removeprefix(folder)
            (1, '/epoch=0-step=1.ckpt')
        """

        def check(record: Record) -> Restored:
            verify(self._directory.storage, record)
            return Restored(record=record, state=None)

        self.check_open()
        self._executor.settle()
        found = resume.go_to(which, self._directory, self.on_mirror(), contents, check)
        self.go_on_from(found)
        return (found.record, address(self._directory.storage, found.record.name)) if found else None

    def hold(self) -> int:
        """Claim the run for this process, if that is not done, and return the number of the term.

        A host that writes files itself first announces them in a file of its own, then calls this, then writes them.

        Raises:
            FencedError: If another process has taken over the run.
            RunInUseError: If another process trains the run.
        """
        self.check_open()
        self._executor.settle()
        directory = self._directory
        directory.contents.prepare()
        directory.hold(directory.manifest.run)
        assert directory.journal.term is not None, "claimed above"
        return directory.journal.term.number

    def make_way(self, name: str, stem: str | None = None) -> str | None:
        """Rename the file or folder ``name``, with its record, for a trainer that is about to write there itself.

        Args:
            name: The name that has to be free, on a local disk.
            stem: The stem of the new name; None puts ``earlier-`` before the old one. If it is taken it gets a version.

        Returns:
            The new name; None if there was nothing under the old one.

        Raises:
            StorageError: If the storage has no paths.
        """
        self.check_open()
        self._executor.settle()
        self._directory.hold(self._directory.manifest.run)
        stem = stem or f"earlier-{name.removesuffix(self._directory.policy.name.suffix)}"
        return self._directory.names.make_way(name, stem)

    def let_replace(self, names: Iterable[str]) -> None:
        """Let the next checkpoints and aliases of these names replace files of another program, each in one step.

        Such a file has no record, so without this call a checkpoint of its name gets a version. A rescue replaces none
        of them.
        """
        self._directory.names.let_replace(names)

    def state_dict(self, saving: Save | None = None) -> dict[str, Any]:
        """Return the state that a host keeps in its own checkpoint, primitives only: its resume is then a restore.

        Args:
            saving: The decision about the checkpoint that will contain this state: it counts as carried out. None takes
                the decision that `commit` is carrying out, if there is one.
        """
        saving = saving or self._executor.saving
        regular, since = saving is not None and saving.kind == "regular", self._schedule.since
        return resume.HostState(
            run=self._directory.manifest.run,
            line=self._directory.manifest.line,
            step=max(self._schedule.last_step, saving.observation.step if saving else 0, 0),
            since=saving.observation.progress.after([since]) if saving and regular else since,
            owed="" if regular else self._schedule.owed,
        ).to_dict()

    def load_state_dict(self, state: Mapping[str, Any], *, source: str = "") -> None:
        """Go on with the run that `state_dict` describes, from the step it was taken at.

        Args:
            state: The result of `state_dict`.
            source: Name of the checkpoint that the user goes on from; no rule retires it while the manager is open.

        Raises:
            RecordError: If it is not a result of `state_dict`.
        """
        self.check_open()
        host = resume.HostState.from_dict(state)
        self._executor.settle()
        since = resume.go_on(host, self._directory, self.on_mirror(), source)
        self._schedule.go_on(since, self._clock.time(), step=host.step, owed=host.owed)

    def on_mirror(self) -> MirrorSnapshot:
        """Return the contents of the mirror as they are now; empty without one."""
        return self._mirror.look() if self._mirror is not None else MirrorSnapshot()

    def go_on_from(self, restored: Restored | None) -> None:
        """Count from the restored checkpoint, because it is the newest state now."""
        if restored is not None:
            self._schedule.go_on(self.manifest.progress_at(restored.record), self._clock.time())
            self._executor.saver.changed()

    def check_open(self) -> None:
        """Raise `ClosedError` if the manager is closed."""
        if self.is_closed:
            msg = "the manager is closed; make another one for the same directory and restore()"
            raise ClosedError(msg)
