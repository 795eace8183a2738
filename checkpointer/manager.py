"""The checkpoint manager: what a training loop calls. The pure functions of `checkpointer.policy` decide."""

from __future__ import annotations

import functools
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Final, Literal, get_args

import attrs
import yaml

from checkpointer._display import some_of
from checkpointer._new_file import new_file
from checkpointer._validation import as_index, check_function
from checkpointer.clock import SystemClock
from checkpointer.commit.created import created
from checkpointer.commit.directory import Directory, held
from checkpointer.commit.lease import LEASE_S, as_lease
from checkpointer.commit.payload_names import location
from checkpointer.commit.signing import HMACKey, has_key
from checkpointer.errors import (
    ConflictError,
    NotFoundError,
    PolicyError,
    SaveError,
    failures_as_warnings,
    warn,
)
from checkpointer.formats import open_format
from checkpointer.mirror.mirror import MirrorThread
from checkpointer.mirror.plan import Mirror
from checkpointer.policy.decide import Decision, Save, Skip, decide_rescue, manifest_html
from checkpointer.policy.policy import Policy
from checkpointer.policy.schedule import Schedule
from checkpointer.policy.triggers import AtSteps
from checkpointer.ports import (
    Clock,
    FolderFormat,
    Format,
    Listener,
    Storage,
    SupportsCapabilities,
    SupportsPaths,
)
from checkpointer.records.record import Progress, Record
from checkpointer.restore import resume
from checkpointer.restore.load import Restored, Verify
from checkpointer.restore.load import load as load_verified
from checkpointer.save.background import Busy, as_busy
from checkpointer.save.executor import KeepAlive, SaveExecutor
from checkpointer.save.saver import FOLDER, Saver
from checkpointer.session import Session
from checkpointer.storage.opening import Where, open_storage
from checkpointer.storage.owner import new_owner, release

MIRROR_S: Final = 600.0
"""Seconds that `CheckpointManager.close` waits for the mirror, without ``timeout=``."""
_log = logging.getLogger("checkpointer")


class CheckpointManager:
    """Saves, keeps, finds and restores checkpoints; knows nothing about the training loop.

    Args:
        directory: A path, an fsspec URL, a `checkpointer.ports.Storage`, or None to keep checkpoints in memory.
        policy: When to save and what to keep; None saves nothing (to look at a directory or restore from it).
        state: Returns the state to save. Called only when a save is due, once per save.
        weights: Returns the weights alone, for ``contents="weights"``; None takes ``state``.
        save: Instead of ``state``: writes a checkpoint (a file or folder) to the path that it gets. If the directory is
            a URL, it gets a URL with an unused name.
        format: ``"torch"``, ``"safetensors"`` (weights), ``"dcp"`` (a folder) or a `checkpointer.ports.Format`.
        run: Id of the run to go on with. With None, `restore` goes on with the run of the checkpoint that it finds. If
            there is none, or `restore` is not called, a new run begins.
        label: Distinguishes managers that share a directory.
        listeners: Called when a checkpoint is durable or gone.
        tolerate_failures: How many writes in a row may fail with a warning before `SaveError` is raised: saves, and
            late metrics of a saved step.
        storage_options: What fsspec needs besides the URL, such as credentials; never logged or stored.
        trust: A key that signs each record. A record without its signature is neither restored nor changed.
        mirror: A second place to which checkpoints are copied in the background, and from which `restore` fetches
            missing ones: a path, a URL or a storage, or a `Mirror` that has rules or options of its own. If the mirror
            cannot be reached, training goes on.
        background: ``"wait"`` or ``"skip"`` copies the state and returns; one thread writes it while the loop goes on.
            If a save is due while another is unfinished, ``"wait"`` waits for that one, and ``"skip"`` drops an older
            one that has not begun. Listeners are called on that thread. None writes in the loop.
        takeover: Go on with the run even if another process trains it. That process gets a `FencedError` at its
            next save. None takes it from the environment variable ``CHECKPOINTER_TAKEOVER``.
        lease_s: Seconds without a heartbeat after which another process counts as dead. If the process that trains the
            run sends no heartbeat for that long, this manager takes over the run.
        clock: Returns the time.
        verbose: Log each decision at INFO instead of DEBUG (logger ``checkpointer``).

    Raises:
        StorageError: If the directory cannot be used, or cannot be written to although ``state`` or ``save`` is given.
        AliasInUseError: If a live manager with another label keeps the same alias in this directory. If it has the same
            label, the first save raises it.
        RunInUseError: If ``run`` is given, and another process trains it.
        UntrustedError: If there are signed checkpoints, ``state`` or ``save`` is given, and ``trust`` is not.

    Example:
        >>> from checkpointer import CheckpointManager, EveryEpochs, KeepBest, Policy
        >>> manager = CheckpointManager(
        ...     None, Policy(EveryEpochs(1), [KeepBest(1, "loss", mode="min")]), state=lambda: {"w": 1}
        ... )
        >>> for epoch, loss in enumerate([0.9, 0.4, 0.6]):
        ...     decision = manager.observe({"loss": loss}, step=10 * (epoch + 1), epoch=epoch)
        >>> decision.reason
        '3 epochs finished, every epoch; loss=0.6 is not in the best by loss (min)'
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
        mirror: Mirror | Where | None = None,
        background: Busy | None = None,
        takeover: bool | None = None,
        lease_s: float = LEASE_S,
        clock: Clock | None = None,
        verbose: bool = False,
    ) -> None:
        _check_functions(state, weights, save, copies=as_busy(background) is not None)
        if trust is not None and not isinstance(trust, HMACKey):
            msg = f"trust is a {type(trust).__name__}; pass HMACKey.from_env(name) or HMACKey.from_file(path)"
            raise PolicyError(msg)
        self._open_format = functools.partial(open_format, storage_options=storage_options)
        self._format = self._open_format(format)
        policy = _with_extension(policy or Policy(AtSteps(), []), self._format.extension)
        capture = weights if policy.contents == "weights" and weights is not None else state
        tolerated = as_index(tolerate_failures, "tolerate_failures", PolicyError)
        self._clock = clock or SystemClock()
        self._schedule = Schedule(policy.when)
        self._owner = owner = new_owner()
        keep_alive = KeepAlive()
        self._release = weakref.finalize(keep_alive, release, owner)
        self._writes = writes = capture is not None or save is not None
        storage = open_storage(directory, owner, storage_options)
        lease = as_lease(lease_s, takeover)
        status = functools.partial(_status_of, weakref.ref(self))
        self._mirror: MirrorThread | None = None
        if mirror is not None:
            self._mirror = MirrorThread(mirror, policy, storage, trust, writes, lease, status)
            weakref.finalize(keep_alive, self._mirror.stop)
        # A connection may not be used by two threads at once.
        is_url = isinstance(directory, str) and not isinstance(storage, SupportsPaths)
        again = functools.partial(open_storage, directory, owner, storage_options) if is_url else None
        self._directory = opened = Directory(
            storage,
            owner,
            policy,
            run=run,
            label=label,
            writes=writes,
            trust=trust,
            clock=self._clock,
            lease=lease,
            open_again=again,
            status=status,
        )
        weakref.finalize(keep_alive, opened.holder.stop_heartbeat)
        if self._mirror is not None:
            self._mirror.check = opened.journal.check_term
        on_change = self._mirror.update if self._mirror else None
        self._saver = Saver(opened, self._format, save, tuple(listeners), on_change)
        self._executor = SaveExecutor(
            self._saver, self._schedule, self._clock, capture, tolerated, as_busy(background), keep_alive
        )
        level = logging.INFO if verbose else logging.DEBUG
        self.session = Session(opened, self._schedule, self._executor, self._mirror, self._clock, level)
        self._report_opened(verbose=verbose)
        self._schedule.go_on(self._first_progress(), self._clock.time())
        self._saver.notify("on_opened", self)

    def _report_opened(self, *, verbose: bool) -> None:
        directory, storage = self._directory, self._directory.storage
        if directory.below:
            msg = f"{storage}: these directories below have checkpoints of their own: {some_of(directory.below)}"
            if directory.manifest.records:
                _log.info(msg)
            else:
                warn(f"{msg}. This one has none yet; if you meant one of them, name it")
        if self._writes and self.policy.contents == "weights":
            msg = "contents='weights': these checkpoints cannot resume a run, only load weights"
            directory.contents.warn_once("weights", msg)
        if self._writes:
            _log.info("%s: %s", storage, self.policy)
        if self._writes and verbose and isinstance(storage, SupportsCapabilities):
            _log.info("%s: %s", storage, "; ".join(f"{what}: {how}" for what, how in storage.capabilities().items()))
        if missing := directory.lines.missing_text:
            warn(f"{storage}: {missing}")

    def _first_progress(self) -> Progress:
        manifest = self._directory.manifest
        if manifest.newest_own is not None:
            return manifest.progress_at(manifest.newest_own)
        if any(record.label == manifest.label for record in manifest.records):
            return Progress(time=self._clock.time())
        return Progress(time=created(self._directory, self._clock))

    def observe(
        self,
        metrics: Mapping[str, Any],
        step: int,
        epoch: int | None = None,
        *,
        epoch_end: bool | None = None,
        due: str = "",
    ) -> Decision:
        """Report what happened, and save if that is due.

        Cheap when nothing is due: two comparisons, and the metrics are not looked at. Observing again at a step that
        is saved attaches the new metrics to its record and ranks it again, without writing the payload again.

        Args:
            metrics: What was measured at this step: numbers, numpy scalars or tensors of one element, by name.
            step: Finished optimizer steps.
            epoch: 0-based index of the epoch in progress or just ended. None is for loops without epochs: it takes the
                epoch that is in progress after the last report, which is 0 at the start.
            epoch_end: Whether this report ends the epoch; None means that each report with an ``epoch`` does.
            due: Why it is due even if the trigger says no, such as the end of the training. The rules still decide
                whether it is saved, and what is kept.

        Returns:
            `Save` (truthy), `Attach` or `Skip` (falsy), each with its ``reason``.

        Raises:
            ObservationError: For a step that went back, or an epoch that ends twice while ``epoch_end`` is None.
            MetricError: If a metric is not one number.
            SaveError: If the checkpoint could not be written; older ones are untouched. With ``background=`` also if
                an earlier one could not: then this report was not used, and may be made again.
        """
        schedule = self._schedule
        if not due and schedule.is_quiet(metrics, step, epoch, epoch_end, self._clock):
            return schedule.quiet
        decision = self.session.decide(metrics, step, epoch, epoch_end=epoch_end, due=due)
        return self._executor.execute(decision) if isinstance(decision, Save) else decision

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until every save in the background is durable. Without ``background=`` return True at once.

        Ctrl-C ends the wait, not the save.

        Args:
            timeout: Seconds to wait at most; None waits as long as it takes.

        Returns:
            Whether every save is durable.

        Raises:
            SaveError: If a checkpoint could not be written; older ones are untouched.
        """
        done = self._executor.settle(timeout)
        self._executor.collect()
        return done

    def rescue(
        self,
        reason: str = "asked for",
        *,
        step: int | None = None,
        epoch: int | None = None,
        timeout: float | None = None,
    ) -> Decision:
        """Save now, outside the policy: under a name of its own, over no other checkpoint, and never ranked.

        It counts as the newest for `restore`, and ``last`` names it. The next regular save retires it. If the step is
        saved already, nothing is written. It is durable on return, also with ``background=``: unfinished saves are
        finished first, and if one fails, the rescue is written nevertheless.

        Args:
            reason: Why, for the record.
            step: Finished optimizer steps; None takes the last observation's.
            epoch: 0-based index of the epoch; None takes the last observation's.
            timeout: Seconds to wait at most for unfinished saves; None waits as long as it takes.

        Raises:
            ObservationError: If ``step`` is before the step that the run goes on from.
            SaveError: If it could not be written, or if the wait took longer than ``timeout``.
        """
        self.session.check_open()
        if not self._executor.settle(timeout):
            msg = f"after {timeout:.1f} s {self._executor.unfinished} is still being written, so no rescue was begun"
            raise SaveError(msg)
        now = self._schedule.last_report(step, epoch, self._clock.time())
        if now is None:
            return Skip(reason="nothing was observed since the start, so there is nothing new to rescue")
        saved = self._directory.manifest.at_step(now.step)
        if saved is not None and saved.contents == "full":
            return Skip(reason=f"step {now.step} is saved already as {saved.name}")
        return self._executor.execute(decide_rescue(self.policy, now, self._directory.manifest, reason), at_once=True)

    def restore(
        self,
        which: str | int | None = None,
        *,
        weights_only: bool = True,
        map_location: Any = "cpu",
        contents: Literal["full", "any"] = "full",
        verify: Verify = "full",
        mmap: bool = False,
    ) -> Restored | None:
        """Verify and load a checkpoint, and go on with its run from there.

        Later checkpoints of the run are *abandoned* from now on: not ranked, never ``last``, not deleted. With a mirror
        its checkpoints are candidates, too. If one is only there, or damaged here, it is fetched first.

        Args:
            which: None or ``"last"`` for the newest valid one, ``"best"``, a name, or a step.
            weights_only: Unpickle nothing but plain data; pass False only for a file you trust.
            map_location: Where tensors go, as for ``torch.load``.
            contents: ``"any"`` also takes checkpoints that hold only weights.
            verify: ``"full"`` compares the digest of all bytes with the record. ``"mine"`` leaves out the parts of a
                folder of shards that are not read; otherwise it is ``"full"``. ``"size"`` compares only the size, and
                is refused with ``trust=``.
            mmap: Map a local file into memory instead of reading it, which is many times faster. The tensors use its
                pages, so no program may change the file in place while they are used; on a network mount, nor delete
                it. If the storage is not local, or the format cannot be mapped, it has no effect.

        Returns:
            What was restored, or None if there is no checkpoint at all.

        Raises:
            NoValidCheckpointError: If there are checkpoints, but none is valid: a training never starts over silently.
            NotFoundError: If there is no checkpoint of that name or step. Also if several runs have one of that step,
                and none of them was chosen.
            CorruptError: If the checkpoint of that name or step is not as it was written.
            UnsafePayloadError: If it holds objects that a safe load refuses.
            UntrustedError: If the checkpoint of that name is not signed with the manager's key.
            RestoreError: If it has to be fetched from the mirror, and there is no room for it; or if a remote storage
                does not answer.
        """
        if verify not in get_args(Verify):
            msg = f"verify is {verify!r}; expected 'full', 'mine' or 'size'"
            raise PolicyError(msg)
        if verify == "size" and has_key(self._directory.journal.trust):
            msg = "verify='size' would load payloads whose bytes are not verified; leave it out, or open without trust="
            raise PolicyError(msg)

        directory = self._directory
        load = functools.partial(
            load_verified,
            directory.storage,
            self._format_of,
            weights_only=weights_only,
            map_location=map_location,
            verify=verify,
            mmap=mmap,
        )
        self.session.check_open()
        self._executor.settle()
        restored = resume.go_to(which, directory, self.session.on_mirror(), contents, load, strict=True)
        self.session.go_on_from(restored)
        return restored

    def _format_of(self, record: Record) -> Format | FolderFormat:
        if record.format in (self._format.name, FOLDER):
            return self._format
        return self._open_format(record.format)

    @property
    def policy(self) -> Policy:
        """The policy in force. If other runs have the plain alias names, its aliases have a version."""
        return self._directory.policy

    @property
    def records(self) -> tuple[Record, ...]:
        """The run's checkpoints in commit order, rescues included."""
        return self.session.manifest.live

    @property
    def last(self) -> Record | None:
        """The newest checkpoint, rescues included; None if there is none."""
        return self.session.manifest.newest

    @property
    def best(self) -> Record | None:
        """The best checkpoint by the first `KeepBest`; None if none is ranked."""
        return self.policy.best_of(self.session.manifest.history)

    def location(self, name: str) -> str:
        """Return the path or URL of the checkpoint of that name, such as ``torch.load`` takes; it need not be there."""
        return location(self._directory.storage, name)

    def pin(self, name: str) -> None:
        """Never retire this checkpoint, also after a restart.

        If this manager does not train the run, it holds the run until the pin is written. During that time a process
        that starts to train the run gets a `RunInUseError`.

        Args:
            name: Name of a checkpoint of the run, as in `Record.name`.

        Raises:
            NotFoundError: If the run does not have the checkpoint.
            RunInUseError: If another process trains the run, because that process would remove the checkpoint anyway.

        Example:
            >>> from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy
            >>> with CheckpointManager(None, Policy(EverySteps(1), [KeepLast(1)]), state=dict) as manager:
            ...     for step in (1, 2, 3):
            ...         _ = manager.observe({}, step, epoch=0, epoch_end=False)
            ...         if step == 1:
            ...             manager.pin(manager.last.name)
            >>> [record.name for record in manager.records]
            ['epoch=0-step=1.ckpt', 'epoch=0-step=3.ckpt']
        """
        self._set_pinned(name, pinned=True)

    def unpin(self, name: str) -> None:
        """Let the rules decide about this checkpoint again, from the next save on. Raises the same errors as `pin`."""
        self._set_pinned(name, pinned=False)

    def _set_pinned(self, name: str, *, pinned: bool) -> None:
        self.session.check_open()
        self._executor.settle()
        own = self.session.manifest.own
        record = next((one for one in own if one.name == name), None)
        if record is None:
            msg = f"the run has no checkpoint {name!r} (have: {', '.join(r.name for r in own) or 'none'})"
            raise NotFoundError(msg)
        directory = self._directory
        with held(directory, record.run):
            # If the run was taken over for this, the checkpoint may have another name now.
            record = next((one for one in directory.manifest.records if one.token == record.token), None)
            if record is not None and pinned and record.name in self.policy.aliases:
                # The next save overwrites the alias, so a pinned checkpoint needs a name of its own.
                directory.contents.prepare()
                record = directory.names.move_slot(record)
            if record is None:
                msg = f"{name} is gone, and cannot be pinned"
                raise NotFoundError(msg)
            directory.rewrite(attrs.evolve(record, pinned=pinned))
        self._saver.changed()

    def to_yaml(self, path: str | os.PathLike[str] | None = None) -> dict[str, float]:
        """Write the best k as ``{path: score}``, best first, and return it.

        Args:
            path: The file; None writes ``best_k_models.yaml`` in the directory.
        """
        self._executor.settle()
        by_name = self.policy.scores(self.session.manifest.history)
        scores = {self.location(name): score for name, score in by_name.items()}
        text = yaml.safe_dump(scores, sort_keys=False, allow_unicode=True)
        if path is None:
            self._directory.contents.check_key()
            self._directory.journal.check_term()
            self._directory.storage.write("best_k_models.yaml", text.encode())
        else:
            with new_file(path, replaces=True) as stream:
                stream.write(text.encode())
        return scores

    def close(self, error: BaseException | None = None, *, timeout: float | None = None) -> None:
        """Finish: wait for the writer, write the index, release the aliases, wait for the mirror.

        A second call does nothing. Ctrl-C ends the wait for the writer, and leaves the manager open.

        Args:
            error: The exception that ends the training. If the policy wants a rescue checkpoint, it is written first.
                A failed save is then only a warning, so that ``error`` is not hidden.
            timeout: Seconds to wait at most for the writer and then the mirror, whose progress is logged at INFO. A
                warning names what is not done, and the next process goes on with the mirror. None waits as long as the
                writer takes, and 600 s for the mirror.

        Raises:
            SaveError: If a checkpoint could not be written in the background. The manager is closed nevertheless.
        """
        if self.session.is_closed:
            return
        try:
            if error is not None and self.policy.rescue and self._writes and not isinstance(error, ConflictError):
                with failures_as_warnings("no rescue checkpoint could be written"):
                    self.rescue(f"{type(error).__name__}: {error}", timeout=timeout)
        finally:
            self._close(timeout)
            if error is None:
                self._executor.collect()
            else:
                with failures_as_warnings():
                    self._executor.collect()

    def _close(self, timeout: float | None) -> None:
        started = time.monotonic()
        if self._executor.settle(timeout):
            if self._executor.process is not None:
                self._executor.process.close()
            self._directory.close()
            self._release()
        else:  # The writer thread still uses the directory. Both end with the process.
            msg = (
                f"after {timeout:.1f} s {self._executor.unfinished} is still being written, and close() stops waiting. "
                "If the process ends before the save does, the run goes on from the previous checkpoint"
            )
            warn(msg)
        self.session.is_closed = True
        self._schedule.wake()  # The next report raises that the manager is closed.
        if self._mirror is not None:
            left = MIRROR_S if timeout is None else timeout - (time.monotonic() - started)
            self._mirror.close(max(0.0, left))

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close(error)

    def __repr__(self) -> str:
        where = str(self._directory.storage)
        return f"<CheckpointManager {where!r}: {len(self.records)} checkpoints; {self.policy}>"

    def _repr_html_(self) -> str:
        return manifest_html(self.policy, self.session.manifest, str(self._directory.storage))


def _status_of(reference: weakref.ref[CheckpointManager]) -> str:
    """Return what the heartbeat says of the training. A manager that does not exist any more says nothing."""
    manager = reference()
    return "" if manager is None else manager.session.status.to_json()


def _check_functions(state: object, weights: object, save: object, *, copies: bool) -> None:
    if save is not None and (state is not None or weights is not None):
        msg = "both save= and state= (or weights=) are given; pass the one that takes the state"
        raise PolicyError(msg)
    for name, function in (("state", state), ("weights", weights), ("save", save)):
        check_function(function, f"{name}=", PolicyError)
    if copies and save is not None:
        msg = "background= needs state=: what save= writes is read from the live objects while they change"
        raise PolicyError(msg)


def _with_extension(policy: Policy, extension: str) -> Policy:
    if policy.name.extension is not None:
        return policy
    return attrs.evolve(policy, name=attrs.evolve(policy.name, extension=extension))
