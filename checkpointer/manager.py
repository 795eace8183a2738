"""The checkpoint manager: the one object with state and effects. Everything it decides is decided in `deciding`."""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Final, Literal

import attrs
import yaml

from checkpointer._display import some_of
from checkpointer._validation import as_index, check_function
from checkpointer.clock import SystemClock
from checkpointer.commit.directory import Directory
from checkpointer.commit.signing import HMACKey
from checkpointer.errors import (
    CheckpointerWarning,
    ClosedError,
    NotFoundError,
    PolicyError,
    SaveError,
)
from checkpointer.formats import open_format
from checkpointer.formats.snapshot import Snapshots
from checkpointer.mirror.mirror import MirrorStatus, open_mirror
from checkpointer.policy.decide import Attach, Decision, Save, Skip, after, decide, decide_rescue
from checkpointer.policy.explain import manifest_html
from checkpointer.policy.policy import Policy
from checkpointer.policy.retention import Limit, Rule
from checkpointer.policy.schedule import Schedule
from checkpointer.policy.triggers import AtSteps, Horizon
from checkpointer.ports import (
    Clock,
    FolderFormat,
    Format,
    Listener,
    Snapshotting,
    Storage,
    SupportsCapabilities,
    SupportsSnapshots,
)
from checkpointer.records.manifest import Manifest
from checkpointer.records.record import Observation, Progress, Record
from checkpointer.restore import load as restoring
from checkpointer.restore import resume as resuming
from checkpointer.restore.fetch import MirrorSnapshot
from checkpointer.restore.load import Restored
from checkpointer.restore.resume import HostState
from checkpointer.save.background import Background, BackgroundStatus, Busy, as_busy, copies_of
from checkpointer.save.executor import Life, SaveExecutor
from checkpointer.save.payload import FOLDER, Writer
from checkpointer.save.saver import Saver
from checkpointer.storage.opening import Where, open_storage
from checkpointer.storage.owner import new_owner, release

__all__ = ["MANAGER_OPTIONS", "CheckpointManager", "check_options"]

_log = logging.getLogger("checkpointer")


class CheckpointManager:
    """Saves, keeps, finds and restores checkpoints; knows nothing about the training loop.

    Args:
        directory: A path, an fsspec URL, a `checkpointer.ports.Storage`, or None to keep checkpoints in memory.
        policy: When to save and what to keep; None saves nothing (to look at a directory or restore from it).
        state: Returns the state to save. Called only when a save is due, once per save.
        weights: Returns the weights alone, for ``contents="weights"``; None takes ``state``.
        save: Instead of ``state``: writes a checkpoint (a file or folder) to the path it is given, or to the URL where
            the directory is one: there it is a name that nobody has.
        format: ``"torch"``, ``"safetensors"`` (weights), ``"dcp"`` (a folder) or a `checkpointer.ports.Format`.
        run: Id of the run to go on with; None starts a new one, until `restore` adopts the one it finds.
        label: Tells managers apart that share a directory.
        listeners: Told when a checkpoint is durable or gone.
        tolerate_failures: How many writes in a row may fail with a warning before `SaveError` is raised: saves, and
            late metrics of a saved step.
        storage_options: What fsspec needs besides the URL, such as credentials; never logged or stored.
        trust: A key that signs each record; one that it has not signed is neither restored nor touched.
        mirror: A second place, given as the directory is, to which checkpoints are copied in the background, and from
            which `restore` fetches what is not here. One that is down holds nothing up.
        mirror_keep: Rules and limits for what lives there; None takes the policy's.
        mirror_options: As ``storage_options``, for the mirror.
        background: True copies the state and returns; one thread writes it while the loop goes on. If a save is due
            while another is still running, ``"wait"`` (or True) waits for that one, and ``"skip"`` drops an older
            one that has not begun. Listeners are called on that thread.
        clock: Where the time comes from.
        verbose: Log each decision at INFO instead of DEBUG (logger ``checkpointer``).

    Raises:
        StorageError: If the directory cannot be used, or cannot be written to although ``state`` or ``save`` is given.
        AliasInUseError: If another live manager keeps the same alias in this directory.
        UntrustedError: If there are signed checkpoints, ``state`` or ``save`` is given, and ``trust`` is not.

    Example:
        >>> from checkpointer import CheckpointManager, EveryEpochs, KeepBest, Policy
        >>> manager = CheckpointManager(
        ...     None, Policy(EveryEpochs(1), [KeepBest(1, "loss", mode="min")]), state=lambda: {"w": 1}
        ... )
        >>> for epoch, loss in enumerate([0.9, 0.4, 0.6]):
        ...     decision = manager.observe({"loss": loss}, step=10 * (epoch + 1), epoch=epoch)
        >>> decision.reason
        '3 epochs finished, every 1; loss=0.6 is not in the best 1 by loss (min)'
        >>> manager.best.name, manager.restore("best").state
        ('epoch=1-step=20.ckpt', {'w': 1})
        >>> manager.close()
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | Storage | None,
        policy: Policy | None = None,
        *,
        state: Callable[[], Any] | None = None,
        weights: Callable[[], Any] | None = None,
        save: Callable[[str], None] | None = None,
        format: str | Format | FolderFormat = "torch",
        run: str | None = None,
        label: str = "",
        listeners: Iterable[Listener] = (),
        tolerate_failures: int = 0,
        storage_options: Mapping[str, Any] | None = None,
        trust: HMACKey | None = None,
        mirror: Where | None = None,
        mirror_keep: Iterable[Rule | Limit] | None = None,
        mirror_options: Mapping[str, Any] | None = None,
        background: bool | Busy = False,
        clock: Clock | None = None,
        verbose: bool = False,
    ) -> None:
        if save is not None and (state is not None or weights is not None):
            msg = "both save= and state= (or weights=) are given; pass the one that takes the state"
            raise PolicyError(msg)
        for name, function in (("state", state), ("weights", weights), ("save", save)):
            check_function(function, f"{name}=", PolicyError)
        busy = as_busy(background)
        if busy is not None and save is not None:
            msg = "background= needs state=: what save= writes is read from the live objects while they change"
            raise PolicyError(msg)
        if trust is not None and not isinstance(trust, HMACKey):
            msg = f"trust is a {type(trust).__name__}; pass HMACKey.from_env(name) or HMACKey.from_file(path)"
            raise PolicyError(msg)
        self._open_format = functools.partial(open_format, storage_options=storage_options)
        self._format = self._open_format(format)
        policy = _with_extension(policy or Policy(AtSteps(), []), self._format.extension)
        capture = weights if policy.contents == "weights" and weights is not None else state
        tolerated = as_index(tolerate_failures, "tolerate_failures", PolicyError)
        self._clock = clock or SystemClock()
        self._level = logging.INFO if verbose else logging.DEBUG
        self._closed = False
        self._pacing = Schedule(policy.when)
        self._owner = owner = new_owner()
        life = Life()
        self._release = weakref.finalize(life, release, owner)
        self._writes = writes = capture is not None or save is not None
        storage = open_storage(directory, owner, storage_options)
        self._mirror = open_mirror(mirror, mirror_keep, mirror_options, policy, storage, trust=trust, copies=writes)
        if self._mirror is not None:
            weakref.finalize(life, self._mirror.stop)
        self._directory = Directory(
            storage, owner, policy, run=run, label=label, writes=writes, trust=trust, clock=self._clock
        )
        self._say_what_is_below(storage)
        writer = Writer(self._directory, self._format, save)
        self._saver = Saver(
            self._directory, writer, tuple(listeners), self._mirror.tell if self._mirror is not None else None
        )
        self._background = None
        snapshots: Snapshotting | None = None
        if busy is not None:
            self._background = Background(busy, self._directory.look, self._pacing.wake)
            own = self._format.snapshots if isinstance(self._format, SupportsSnapshots) else Snapshots
            snapshots = own(copies_of(busy))
        self._carrier = SaveExecutor(
            self._saver, self._pacing, self._clock, capture, tolerated, self._background, snapshots, life
        )
        if writes and policy.contents == "weights":
            msg = "contents='weights': these checkpoints cannot resume a run, only load weights"
            self._directory.say_once("weights", msg)
        _log.info("%s: %s", storage, self.policy)
        if writes and verbose and isinstance(storage, SupportsCapabilities):
            words = "; ".join(f"{what}: {how}" for what, how in storage.capabilities().items())
            _log.info("%s: %s", storage, words)
        if missing := self._directory.missing_text:
            warnings.warn(f"{storage}: {missing}", CheckpointerWarning, stacklevel=2)
        self._pacing.go_on(self._first_progress(), self._clock.time())
        self._saver.tell("on_opened", self)

    def _say_what_is_below(self, storage: Storage) -> None:
        below = self._directory.below
        if not below:
            return
        msg = f"{storage}: these directories below have checkpoints of their own: {some_of(below)}"
        if self._directory.manifest.records:
            _log.info(msg)
        else:
            hint = "This one has none yet; if you meant one of them, name it"
            warnings.warn(f"{msg}. {hint}", CheckpointerWarning, stacklevel=3)

    def _first_progress(self) -> Progress:
        manifest = self._directory.manifest
        if manifest.own:
            return manifest.own[-1].progress
        if any(record.label == manifest.label for record in manifest.records):
            return Progress(time=self._clock.time())
        return Progress(time=self._directory.created(self._clock))

    # The hot path

    def observe(
        self, metrics: Mapping[str, Any], step: int, epoch: int, *, epoch_end: bool | None = None, due: str = ""
    ) -> Decision:
        """Report what happened, and save if that is due.

        Cheap when nothing is due: two comparisons, and the metrics are not looked at. Observing again at a step that
        is saved attaches the new metrics to its record and ranks it anew, without writing the payload again.

        Args:
            metrics: What was measured at this step: numbers, numpy scalars or tensors of one element, by name.
            step: Finished optimizer steps.
            epoch: 0-based index of the epoch in progress or just ended.
            epoch_end: Whether this report ends the epoch; None means that each report does.
            due: Why it is due whatever the trigger says, such as the end of the training: what is kept, and whether
                it is saved at all, is still the rules' to say.

        Returns:
            `Save` (truthy), `Attach` or `Skip` (falsy), each with its ``reason``.

        Raises:
            ObservationError: For a step that went back, or an epoch that ends twice while ``epoch_end`` is None.
            MetricError: If a metric is not one number.
            SaveError: If the checkpoint could not be written; older ones are untouched. With ``background=`` also if
                an earlier one could not: then this report was not looked at, and may be made again.
        """
        if not due and self._pacing.is_quiet(metrics, step, epoch, epoch_end, self._clock.time):
            return self._pacing.quiet
        decision = self.decide(metrics, step, epoch, epoch_end=epoch_end, due=due)
        return self.commit(decision) if isinstance(decision, Save) else decision

    @property
    def horizon(self) -> Horizon:
        """Below which nothing is due: whoever reports from several processes can be silent together."""
        return self._pacing.horizon

    def decide(
        self,
        metrics: Mapping[str, Any],
        step: int,
        epoch: int,
        *,
        epoch_end: bool | None = None,
        due: str = "",
    ) -> Decision:
        """Decide without writing a payload, for trainers that own the moment: then `commit` what they wrote.

        An `Attach` is carried out at once. Arguments and errors as for `observe`.
        """
        self._check_open()
        now = self._pacing.observation(metrics, step, epoch, epoch_end=epoch_end, time=self._clock.time())
        self._carrier.hear()
        decision = self._decide(now, due)
        if isinstance(decision, Attach):
            decision = self._carrier.attach(decision)
        if isinstance(decision, Skip) and decision.due:
            self._pacing.answered(now.progress, self._clock.time(), waiting=decision.waiting)
        elif not isinstance(decision, Save) and self.policy.when.due(now.progress, self._pacing.since):
            # The step is saved already, and that answers this due point: it must not come up again at the next step.
            self._pacing.answered(now.progress, self._clock.time(), waiting=self._pacing.owed)
        _log.log(self._level, "step %d: %s", now.step, decision.reason)
        return decision

    def after(self, decision: Decision) -> Manifest:
        """Return the records as they will be once the decision is carried out."""
        return after(decision, self._carrier.outlook())

    def _decide(self, now: Observation, why: str = "") -> Decision:
        manifest = self._carrier.outlook()
        if now.step < self._pacing.last_step and manifest.at_step(now.step) is None:
            if now.step in self._carrier.saved_steps:
                return Skip(reason=f"step {now.step} was saved, and is retired since")
            self._pacing.refuse(now.step)
        self._carrier.reported |= now.metrics.keys()
        if not manifest.seen.issuperset(now.metrics):
            manifest = attrs.evolve(manifest, seen=manifest.seen.union(now.metrics))
        owed = self._pacing.owed or why
        decision = decide(self.policy, now, manifest, since=self._pacing.since, owed=owed)
        # A slot is declined by all rules but the alias.
        declined = decision.due if isinstance(decision, Skip) else decision.name in self.policy.aliases
        if declined and not isinstance(decision, Attach) and self._carrier.look_before_declining(now):
            decision = decide(self.policy, now, self._carrier.outlook(), since=self._pacing.since, owed=owed)
        if isinstance(decision, Save) or (isinstance(decision, Skip) and decision.due):
            self._warn_of_absent(now, manifest.seen)
        return decision

    def _warn_of_absent(self, now: Observation, seen: frozenset[str]) -> None:
        # Within the first epoch a metric of its end cannot be there yet; after it, the name is probably wrong.
        if not now.metrics or (now.epoch == 0 and not now.epoch_end):
            return
        have = ", ".join(sorted(seen))
        for name in sorted(self.policy.known_metrics - seen - {"epoch", "step"}):
            msg = f"metric {name!r} was not reported at step {now.step} (have: {have}): not ranked until it is"
            self._directory.say_once(f"absent {name}", msg)

    # Saving

    def commit(self, decision: Decision, path: str | os.PathLike[str] | None = None) -> Decision:
        """Carry out a `Save`.

        Args:
            decision: What `decide` returned; anything but a `Save` is returned as it is.
            path: Where a trainer has written the checkpoint, inside the directory: it is adopted under that name.
                None takes the state and writes it.

        Returns:
            The `Save` with what was really retired, or a `Skip` if the write failed and that is tolerated.

        Raises:
            SaveError: If the checkpoint could not be written; older ones are untouched.
        """
        self._check_open()
        if not isinstance(decision, Save):
            return decision
        return self._carrier.carry(decision, path)

    # What is under way in the background

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until what is being saved in the background is durable. Without ``background=`` nothing ever is.

        Ctrl-C ends the wait, not the save.

        Args:
            timeout: Seconds to wait at most; None waits as long as it takes.

        Returns:
            Whether all of it is.

        Raises:
            SaveError: If a checkpoint could not be written; older ones are untouched.
        """
        done = self._background is None or self._background.wait(timeout)
        self._carrier.hear()
        return done

    def rescue(self, reason: str = "asked for", *, step: int | None = None, epoch: int | None = None) -> Decision:
        """Save now, outside the policy: own name, never over anything, never ranked.

        Counts as newest when restoring; the first regular save after it retires it. If the step is saved already
        nothing is written. Whatever ``background=`` says, it is durable on return: what is being written is finished
        first, and its failure is no reason not to rescue.

        Args:
            reason: Why, for the record.
            step: Finished optimizer steps; None takes the last observation's.
            epoch: 0-based index of the epoch; None takes the last observation's.

        Raises:
            ObservationError: If ``step`` is before the step that the run goes on from.
            SaveError: If it could not be written.
        """
        self._check_open()
        self._carrier.settle()
        now = self._pacing.last_report(step, epoch, self._clock.time())
        if now is None:
            return Skip(reason="nothing was observed since the start, so there is nothing new to rescue")
        saved = self._directory.manifest.at_step(now.step)
        if saved is not None and saved.contents == "full":
            return Skip(reason=f"step {now.step} is saved already as {saved.name}")
        return self._carrier.carry_here(decide_rescue(self.policy, now, self._directory.manifest, reason))

    # Restoring

    def restore(
        self,
        which: str | int | None = None,
        *,
        weights_only: bool = True,
        map_location: Any = "cpu",
        contents: Literal["full", "any"] = "full",
        verify: restoring.Verify = "full",
        mmap: bool = False,
    ) -> Restored | None:
        """Verify and load a checkpoint, and go on with its run from there.

        Checkpoints of the run beyond it are *abandoned* from now on: not ranked, never ``last``, not deleted. With a
        mirror its checkpoints are candidates too; one that is only there, or damaged here, is fetched first.

        Args:
            which: None or ``"last"`` for the newest valid one, ``"best"``, a name, or a step.
            weights_only: Unpickle nothing but plain data; pass False only for a file you trust.
            map_location: Where tensors go, as for ``torch.load``.
            contents: ``"any"`` also takes checkpoints that hold only weights.
            verify: ``"full"`` compares every byte's digest with the record; ``"size"`` only looks at the size, and is
                refused under ``trust=``.
            mmap: Map a local file into memory instead of reading it: many times faster, and the tensors live on its
                pages. For files that nobody changes in place while the tensors are used; on a network mount, nor
                deletes. Elsewhere, and for formats that cannot be mapped, it changes nothing.

        Returns:
            What was restored, or None if there is no checkpoint at all.

        Raises:
            NoValidCheckpointError: If there are checkpoints, but none is valid: it never starts over silently.
            NotFoundError: If the name or step asked for is not there.
            CorruptError: If the checkpoint asked for by name or step is not what was written.
            UnsafePayloadError: If it holds what a safe load refuses.
            UntrustedError: If the checkpoint asked for by name is not signed with the manager's key.
            RestoreError: If it has to be fetched from the mirror, and there is no room for it; or if a storage that
                is not on this machine does not answer.
        """
        if verify not in ("full", "size"):
            msg = f"verify is {verify!r}; expected 'full' or 'size'"
            raise PolicyError(msg)
        if verify == "size" and self._directory.transaction.trust is not None:
            msg = "verify='size' would believe payloads that nobody has signed; leave it out, or open without trust="
            raise PolicyError(msg)

        def load_here(record: Record) -> Restored:
            payload = self._format_of(record)
            storage = self._directory.storage
            return restoring.load(
                storage,
                record,
                payload,
                weights_only=weights_only,
                map_location=map_location,
                verify=verify,
                mmap=mmap,
            )

        return self._go_to(which, contents, load_here, strangers=self._directory.storage)

    def locate(
        self, which: str | int | None = None, *, contents: Literal["full", "any"] = "full"
    ) -> tuple[Record, str] | None:
        """Do as `restore` does, but do not load: for a trainer that reads its checkpoints itself, folders too.

        Args:
            which: As for `restore`.
            contents: As for `restore`.

        Returns:
            The record of a checkpoint that is whole, and the path or URL where it lies; None if there is no record:
            whatever else is in the directory is the trainer's affair.

        Raises:
            CheckpointError: As `restore`.

        Example:
            >>> import tempfile
            >>> from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy
            >>> folder = tempfile.mkdtemp()
            >>> with CheckpointManager(folder, Policy(EverySteps(1), [KeepLast(1)]), state=dict) as manager:
            ...     decision = manager.observe({}, step=1, epoch=0)
            >>> record, path = CheckpointManager(folder).locate()
            >>> record.step, path.removeprefix(folder)
            (1, '/epoch=0-step=1.ckpt')
        """

        def check(record: Record) -> Restored:
            restoring.verify(self._directory.storage, record)
            return Restored(record=record, state=None)

        found = self._go_to(which, contents, check)
        return (found.record, self._directory.address(found.record.name)) if found else None

    def _go_to(
        self,
        which: str | int | None,
        contents: Literal["full", "any"],
        load_here: Callable[[Record], Restored],
        strangers: Storage | None = None,
    ) -> Restored | None:
        self._check_open()
        self._carrier.settle()
        restored = resuming.go_to(which, self._directory, self._on_mirror(), contents, load_here, strangers)
        if restored is not None:
            self._pacing.go_on(restored.record.progress, self._clock.time())
            self._saver.changed()
        return restored

    def _format_of(self, record: Record) -> Format | FolderFormat:
        if record.format in (self._format.name, FOLDER):
            return self._format
        return self._open_format(record.format)

    # Looking

    @property
    def policy(self) -> Policy:
        """The policy in force; alias names may carry a version if others had the plain ones."""
        return self._directory.policy

    @property
    def manifest(self) -> Manifest:
        """The records as this run sees them; before it has saved or restored, as the newest run does."""
        return self._directory.view

    @property
    def records(self) -> tuple[Record, ...]:
        """The run's checkpoints in commit order, rescues included."""
        return tuple(self.manifest.live)

    @property
    def last(self) -> Record | None:
        """The newest checkpoint, rescues included; None if there is none."""
        return self.manifest.newest

    @property
    def best(self) -> Record | None:
        """The best checkpoint by the first `KeepBest`; None if none is ranked."""
        return self.policy.best_of(self.manifest.history)

    def location(self, name: str) -> str:
        """Return the path or URL of the checkpoint of that name, such as ``torch.load`` takes; it need not be there."""
        return self._directory.location(name)

    @property
    def mirror(self) -> MirrorStatus | None:
        """How far the mirror is; None without one. Asks nobody, so it costs nothing."""
        return self._mirror.status if self._mirror is not None else None

    @property
    def background(self) -> BackgroundStatus | None:
        """What is being written, and how long the loop has waited for it; None without ``background=``."""
        return self._background.status if self._background is not None else None

    # Managing

    def pin(self, name: str) -> None:
        """Never retire this checkpoint; survives restarts. Raises `NotFoundError` if the run has none of that name."""
        self._set_pinned(name, pinned=True)

    def unpin(self, name: str) -> None:
        """Let rules decide on this checkpoint again, from the next save on."""
        self._set_pinned(name, pinned=False)

    def _set_pinned(self, name: str, *, pinned: bool) -> None:
        self._check_open()
        self._carrier.settle()
        own = self.manifest.own
        record = own.named(name)
        if record is None:
            msg = f"the run has no checkpoint {name!r} (have: {', '.join(r.name for r in own) or 'none'})"
            raise NotFoundError(msg)
        if pinned and name in self.policy.aliases:
            # The alias is written over at the next save; what is pinned needs a name of its own.
            self._directory.prepare()
            record = self._directory.move_slot(record)
            if record is None:
                msg = f"{name} is gone, and cannot be pinned"
                raise NotFoundError(msg)
        self._directory.rewrite(attrs.evolve(record, pinned=pinned))
        self._saver.changed()

    def make_way(self, name: str, stem: str | None = None) -> str | None:
        """Rename what lies under ``name``, with its record, for a trainer that is about to write there itself.

        Args:
            name: The name that has to be free, on a local disk.
            stem: What it is to be called; None puts ``earlier-`` before it. Gets a version if it is taken.

        Returns:
            The new name, or None if nothing had the old one.

        Raises:
            StorageError: If the storage has no paths.
        """
        self._check_open()
        self._carrier.settle()
        return self._directory.make_way(name, stem or f"earlier-{name.removesuffix(self.policy.name.suffix)}")

    def to_yaml(self, path: str | os.PathLike[str] | None = None) -> dict[str, float]:
        """Write the best k as ``{path: score}``, best first, and return it.

        Args:
            path: The file; None writes ``best_k_models.yaml`` in the directory.
        """
        self._carrier.settle()
        by_name = self.policy.scores(self.manifest.history)
        scores = {self._directory.location(name): score for name, score in by_name.items()}
        text = yaml.safe_dump(scores, sort_keys=False, allow_unicode=True)
        if path is None:
            self._directory.check_key()
            self._directory.storage.write("best_k_models.yaml", text.encode())
        else:
            with open(path, "w", encoding="utf-8") as stream:
                stream.write(text)
        return scores

    def state_dict(self, saving: Save | None = None) -> dict[str, Any]:
        """Return what a host may keep in its own checkpoint, primitives only: its resume is then a restore.

        Args:
            saving: The decision about the very checkpoint that this goes into: it is taken as carried out. None takes
                the one that `commit` is at, if it is at one.
        """
        saving = saving or self._carrier.saving
        regular = saving is not None and saving.kind == "regular"
        return HostState(
            run=self._directory.manifest.run,
            line=self._directory.manifest.line,
            step=max(self._pacing.last_step, saving.observation.step if saving else 0, 0),
            since=saving.observation.progress if saving and regular else self._pacing.since,
            owed="" if regular else self._pacing.owed,
        ).to_dict()

    def load_state_dict(self, state: Mapping[str, Any], *, source: str = "") -> None:
        """Go on with the run that `state_dict` describes, from the step it was taken at.

        Args:
            state: What `state_dict` returned.
            source: Name of the checkpoint that a person chose to go on from; it lives while the manager does.

        Raises:
            RecordError: If it is not what `state_dict` returned.
        """
        self._check_open()
        account = HostState.from_dict(state)
        self._carrier.settle()
        since = resuming.go_on(account, self._directory, self._on_mirror(), source)
        self._pacing.go_on(since, self._clock.time(), step=account.step, owed=account.owed)

    def close(self, *, timeout: float = 600.0) -> None:
        """Finish: wait for the writer, write the index, give the aliases free, wait for the mirror.

        A second call does nothing. Ctrl-C ends the wait for the writer, and leaves the manager open.

        Args:
            timeout: Seconds to wait for the mirror at most, with its progress logged at INFO; a warning then names
                what it has not got, and the next process goes on with it.

        Raises:
            SaveError: If a checkpoint could not be written in the background; the manager is closed nevertheless.
        """
        if not self._closed:
            self._close(timeout)
            self._carrier.hear()

    def _close(self, timeout: float = 600.0) -> None:
        self._carrier.settle()
        self._directory.close()
        self._closed = True
        self._release()
        self._pacing.wake()  # The next report is told that the manager is closed.
        if self._mirror is not None:
            self._mirror.close(timeout)

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.leave(error)

    def leave(self, error: BaseException | None = None, *, timeout: float = 600.0) -> None:
        """Finish as a ``with`` block does at its end: `close`, after a rescue if an error ends the training.

        Args:
            error: What ends the training; None if nothing is wrong.
            timeout: As for `close`.

        Raises:
            SaveError: As `close` does, if there is no error: else that one is to be seen.
        """
        try:
            if error is not None and self.policy.rescue and not self._closed and self._writes:
                self._rescue_quietly(error)
        finally:
            if error is None:
                self.close(timeout=timeout)
            elif not self._closed:
                self._close(timeout)
                self._hear_quietly()

    def _hear_quietly(self) -> None:
        try:
            self._carrier.hear()
        except SaveError as failure:  # The error that ended the training is the one to be seen.
            warnings.warn(str(failure), CheckpointerWarning, stacklevel=4)

    def _rescue_quietly(self, error: BaseException) -> None:
        try:
            self.rescue(f"{type(error).__name__}: {error}")
        except Exception as failure:  # The error that ended the training is the one to be seen.
            msg = f"no rescue checkpoint could be written: {failure!r}"
            warnings.warn(msg, CheckpointerWarning, stacklevel=4)

    def __repr__(self) -> str:
        where = str(self._directory.storage)
        return f"<CheckpointManager {where!r}: {len(self.records)} checkpoints; {self.policy}>"

    def _repr_html_(self) -> str:
        return manifest_html(self.policy, self.manifest, str(self._directory.storage))

    # Helpers

    def _on_mirror(self) -> MirrorSnapshot:
        return self._mirror.look() if self._mirror is not None else MirrorSnapshot()

    def _check_open(self) -> None:
        if self._closed:
            msg = "the manager is closed; make another one for the same directory and restore()"
            raise ClosedError(msg)


def _with_extension(policy: Policy, extension: str) -> Policy:
    if policy.name.extension is not None:
        return policy
    return attrs.evolve(policy, name=attrs.evolve(policy.name, extension=extension))


MANAGER_OPTIONS: Final = tuple(
    name
    for name, parameter in inspect.signature(CheckpointManager).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
)
"""Names of the arguments that `CheckpointManager` takes besides the directory and the policy."""


def check_options(options: Mapping[str, Any], owner: str, *, own: Iterable[str] = ()) -> None:
    """Raise unless every option is one that ``owner`` can pass on to `CheckpointManager`.

    Args:
        options: The options by name.
        owner: The class that was given them, for the message.
        own: Arguments of `CheckpointManager` that the owner sets itself.

    Raises:
        PolicyError: For an unknown option, with the closest known name, and for one that the owner sets itself.

    Example:
        >>> check_options({"miror": "s3://bucket/run"}, "Loop")
        Traceback (most recent call last):
        ...
        checkpointer.errors.PolicyError: Loop has no option 'miror'; did you mean 'mirror'?
    """
    own = tuple(own)
    for name in options:
        if name in own:
            msg = f"{name!r} cannot be an option: {owner} sets it itself; leave it out"
            raise PolicyError(msg)
        if name not in MANAGER_OPTIONS:
            known = [option for option in MANAGER_OPTIONS if option not in own]
            close = difflib.get_close_matches(str(name), known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"the options are {', '.join(known)}"
            msg = f"{owner} has no option {name!r}; {hint}"
            raise PolicyError(msg)
