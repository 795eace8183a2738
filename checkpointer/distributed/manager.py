"""One manager for several processes: rank 0 decides, and every rank takes and writes its own part of the state."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Literal, TypeVar

import attrs

from checkpointer._validation import check_function
from checkpointer.clock import SystemClock
from checkpointer.commit.index import RECORDS
from checkpointer.distributed.ranks import OneRank, TorchRanks
from checkpointer.distributed.state_io import StateIO
from checkpointer.distributed.team import BARRIER_S, Agreement, Broadcast, all_come, check_alike
from checkpointer.errors import (
    CheckpointerError,
    ClosedError,
    ConflictError,
    PolicyError,
    RestoreError,
    SaveError,
    failures_as_warnings,
    warn,
)
from checkpointer.formats import open_format
from checkpointer.manager import CheckpointManager
from checkpointer.manager_options import check_options
from checkpointer.policy.decide import Decision, Skip
from checkpointer.policy.naming import Naming
from checkpointer.policy.policy import Policy
from checkpointer.policy.schedule import epoch_of
from checkpointer.policy.triggers import NEVER, AtSteps
from checkpointer.ports import Clock, FolderFormat, Format, Ranks, Storage
from checkpointer.records.record import Record
from checkpointer.restore.load import Restored, Verify, load
from checkpointer.save.background import as_busy
from checkpointer.storage import open_storage
from checkpointer.storage.owner import temporary_owner

T = TypeVar("T")


@attrs.frozen(kw_only=True)
class _View:
    """What every rank knows of rank 0's manager."""

    naming: Naming
    """The policy's names; an alias may carry a version."""
    rescues: bool
    names: tuple[str, ...]
    """The names of all records, in commit order."""
    changed: tuple[Record, ...]
    """The records that are new or different since the last view."""
    best: Record | None
    last: Record | None
    base: str
    """A checkpoint's location without its name."""


class DistributedManager:
    """A `CheckpointManager` for a training of several processes; each of them makes one, and calls it alike.

    Rank 0 has the manager: it alone decides, and reads and writes the directory. Every rank gets the decision in one
    small broadcast; an observation that cannot be due needs no communication. Every rank's ``state`` is called,
    because taking it may be a collective. With ``format="dcp"`` each rank writes and reads its own shards, and the
    checkpoint counts once all ranks have written; with another format rank 0 writes its state, and every rank reads it.

    All ranks call each method, except `location`. The properties show what was known after the last decision.

    Args:
        directory: As for `CheckpointManager`; all ranks name the same one.
        policy: When to save and what to keep; rank 0 decides by its own.
        ranks: The processes; None takes those of ``torch.distributed``'s default group.
        state: Returns the state to save: a dict, sharded (DTensor) as the training has it, for ``format="dcp"``.
            A restore reads into what it returns.
        weights: Returns the weights alone, for ``contents="weights"``, on every rank too; None takes ``state``.
        format: ``"dcp"`` for sharded state, or as for `CheckpointManager`.
        storage_options: As for `CheckpointManager`.
        clock: Rank 0's clock.
        **options: Further options of `CheckpointManager`.

    Raises:
        PolicyError: For an option that `CheckpointManager` does not have.
        RanksError: If there is not a process group; and on every rank, if one of them has another policy, format or
            version of this library.

    Example:
        >>> from checkpointer import EverySteps, KeepLast, Policy
        >>> from checkpointer.distributed.ranks import OneRank
        >>> manager = DistributedManager(
        ...     None, Policy(EverySteps(10), [KeepLast(2)]), ranks=OneRank(), state=lambda: {"w": 1}
        ... )
        >>> [bool(manager.observe({}, step=step, epoch=0, epoch_end=False)) for step in (9, 10)]
        [False, True]
        >>> manager.last.name
        'epoch=0-step=10.ckpt'
        >>> manager.close()
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | Storage | None,
        policy: Policy | None = None,
        *,
        ranks: Ranks | None = None,
        state: Callable[[], Any] | None = None,
        weights: Callable[[], Any] | None = None,
        format: str | Format | FolderFormat = "torch",
        storage_options: Mapping[str, Any] | None = None,
        clock: Clock | None = None,
        **options: Any,
    ) -> None:
        check_options(options, type(self).__name__)
        check_function(state, "state=", PolicyError)
        check_function(weights, "weights=", PolicyError)
        self._own_ranks = TorchRanks() if ranks is None else None
        self._ranks: Ranks = self._own_ranks or ranks or OneRank()
        self._policy = policy or Policy(AtSteps(), [])
        self._where = directory, storage_options
        self._clock = clock or SystemClock()
        check_alike(
            self._ranks,
            {**_versions(), "format": str(getattr(format, "name", format)), "policy": _text_of(policy)},
        )
        self._agreement = Agreement(self._ranks)
        self._io = StateIO(
            self._ranks,
            state,
            format,
            weights=weights,
            takes_weights=self._policy.contents == "weights",
            storage_options=storage_options,
            background=as_busy(options.get("background")),
        )
        self.manager: CheckpointManager | None = None
        """Rank 0's manager; None on the others."""
        self._has_state = state is not None or weights is not None
        self._records: tuple[Record, ...] = ()
        self._last_report: tuple[int, int, bool | None] = (-1, 0, False)
        self._is_closed = False

        def open_manager() -> Broadcast[None]:
            self.manager = CheckpointManager(
                directory,
                policy,
                state=self._io.capture if self._has_state else None,
                format=self._io.format,
                storage_options=storage_options,
                clock=self._clock,
                **options,
            )
            return self._broadcast(None)

        self._receive(self._io.team.work(open_manager))

    def _broadcast(self, result: T) -> Broadcast[T]:
        manager = self._own_manager
        known = {record.name: record for record in self._records}
        records = manager.records
        view = _View(
            naming=manager.policy.name,
            rescues=manager.policy.rescue,
            names=tuple(record.name for record in records),
            changed=tuple(r for r in records if (old := known.get(r.name)) is not r and old != r),
            best=manager.best,
            last=manager.last,
            base=manager.location("x").removesuffix("x"),
        )
        return Broadcast(result, manager.session.horizon, view)

    def _receive(self, received: Broadcast[T]) -> T:
        view: _View = received.view
        by_name = {record.name: record for record in (*self._records, *view.changed)}
        self._records = tuple(by_name[name] for name in view.names)
        self._view, self._horizon = view, received.horizon
        self._quiet = Skip(reason=f"not due{received.horizon.text()}")
        self._io.forget()
        return received.result

    def _on_rank_zero(self, act: Callable[[CheckpointManager], T]) -> T:
        self._check_open()
        return self._receive(self._io.team.work(lambda: self._broadcast(act(self._own_manager))))

    @property
    def _own_manager(self) -> CheckpointManager:
        assert self.manager is not None, "this is rank 0"
        return self.manager

    # Saving

    def observe(
        self,
        metrics: Mapping[str, Any],
        step: int,
        epoch: int | None = None,
        *,
        epoch_end: bool | None = None,
        due: str = "",
    ) -> Decision:
        """Report what happened, on every rank alike, and save if that is due: see `CheckpointManager.observe`.

        The manager takes rank 0's metrics. Nothing is communicated unless something can be due. Under a time trigger
        the ranks communicate every few steps, see `checkpointer.distributed.team.Agreement`.
        """
        if epoch is None:
            epoch, epoch_end = epoch_of(self._last_report, step, epoch_end)
        newest, at, _ = self._last_report
        if newest <= step:
            self._last_report = (step, epoch, epoch_end)
            if not due and newest < step and self._is_quiet(step, epoch, epoch_end):
                return self._quiet

        def observe(manager: CheckpointManager) -> Decision:
            if step < newest:  # The manager does not know the quiet reports, and judges an older step by the newest.
                manager.observe({}, newest, at, epoch_end=False)
            return manager.observe(metrics, step, epoch, epoch_end=epoch_end, due=due)

        return self._on_rank_zero(observe)

    def _is_quiet(self, step: int, epoch: int, epoch_end: bool | None) -> bool:
        horizon = self._horizon
        if self._is_closed or not horizon.covers(step, epoch, epoch_end):
            return False
        # Clocks differ, so only rank 0's decides.
        return horizon.time == NEVER or not self._agreement(
            self._ranks.rank == 0 and self._clock.time() >= horizon.time
        )

    def rescue(
        self,
        reason: str = "asked for",
        *,
        step: int | None = None,
        epoch: int | None = None,
        timeout: float | None = None,
    ) -> Decision:
        """Save now, outside the policy, on all ranks together: see `CheckpointManager.rescue`."""
        if self._last_report[0] >= 0:
            step = self._last_report[0] if step is None else step
            epoch = self._last_report[1] if epoch is None else epoch
        return self._on_rank_zero(lambda manager: manager.rescue(reason, step=step, epoch=epoch, timeout=timeout))

    def wait(self, timeout: float | None = None) -> bool:
        """Wait on all ranks until what is being saved in the background is durable: see `CheckpointManager.wait`."""
        return self._on_rank_zero(lambda manager: manager.wait(timeout))

    # Restoring

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
        """Verify and load a checkpoint on all ranks together: see `CheckpointManager.restore`.

        Rank 0 chooses and verifies. If the checkpoint is a file, a rank that can read it loads it, and rank 0 sends
        the state to the others. If it is a folder of shards, all ranks read it together, on any number of ranks.
        """
        options: dict[str, Any] = {
            "weights_only": weights_only,
            "map_location": map_location,
            "verify": verify,
            "mmap": mmap,
        }
        here: Restored | None = None

        def restore() -> Broadcast[Record | None]:
            nonlocal here
            here = self._own_manager.restore(which, contents=contents, **options)
            return self._broadcast(here.record if here else None)

        self._check_open()
        received = self._io.team.work(restore)
        loaded = self._io.loaded
        record = self._receive(received)
        if record is None:
            self._check_none_sees_more()
            return None
        self._last_report = record.step if record.step else -1, record.epoch, record.epoch_end
        if self._io.is_folder and record.format == self._io.name:
            return here or Restored(record=record, state=loaded)
        return self._share(record, here or self._load(record, options))

    def _load(self, record: Record, options: Mapping[str, Any]) -> Restored | None:
        """Return the checkpoint if this rank can read the file that rank 0 has read."""
        storage_options = self._where[1]
        return self._look(
            lambda storage: load(storage, lambda record: open_format(record.format, storage_options), record, **options)
        )

    def _look(self, act: Callable[[Storage], T]) -> T | None:
        """Return what ``act`` returns for the directory as this rank sees it; None if this rank cannot read it."""
        directory, storage_options = self._where
        with temporary_owner() as owner, contextlib.suppress(CheckpointerError, OSError):
            return act(open_storage(directory, owner, storage_options))
        return None

    def _check_none_sees_more(self) -> None:
        """Raise on every rank if rank 0 sees no record, and another rank does: the training would begin anew."""
        if self._ranks.size == 1 or self._where[0] is None:
            return
        sees = self._ranks.gather(bool(self._look(lambda storage: storage.list(RECORDS))))
        if any(sees) and not sees[0]:
            place = self._view.base.rstrip("/")
            msg = (
                f"rank 0 finds no checkpoint in {place}, and rank {sees.index(True)} finds some there; all ranks have "
                "to use one directory, on a disk that they share"
            )
            raise RestoreError(msg)

    def _share(self, record: Record, here: Restored | None) -> Restored:
        """Return the checkpoint on each rank: rank 0 sends the state if a rank could not read it."""
        if all(self._ranks.gather(here is not None)):
            assert here is not None, "all have it"
            return here
        state = self._ranks.broadcast(here.state if here is not None else None)
        return here or Restored(record=record, state=state)

    # Looking

    @property
    def policy(self) -> Policy:
        """The policy in force, on every rank: see `CheckpointManager.policy`."""
        return attrs.evolve(self._policy, name=self._view.naming, rescue=self._view.rescues)

    @property
    def records(self) -> tuple[Record, ...]:
        """The run's checkpoints, on every rank: see `CheckpointManager.records`."""
        return self._records

    @property
    def best(self) -> Record | None:
        """The best checkpoint, on every rank: see `CheckpointManager.best`."""
        return self._view.best

    @property
    def last(self) -> Record | None:
        """The newest checkpoint, on every rank: see `CheckpointManager.last`."""
        return self._view.last

    def location(self, name: str) -> str:
        """Return a checkpoint's path on rank 0, or its URL, without communication: see `CheckpointManager.location`."""
        return f"{self._view.base}{name}"

    # Managing

    def pin(self, name: str) -> None:
        """Never retire this checkpoint: see `CheckpointManager.pin`."""
        self._on_rank_zero(lambda manager: manager.pin(name))

    def unpin(self, name: str) -> None:
        """Let rules decide on this checkpoint again: see `CheckpointManager.unpin`."""
        self._on_rank_zero(lambda manager: manager.unpin(name))

    def to_yaml(self, path: str | os.PathLike[str] | None = None) -> dict[str, float]:
        """Write the best k on rank 0, and return them on every rank: see `CheckpointManager.to_yaml`."""
        return self._on_rank_zero(lambda manager: manager.to_yaml(path))

    def close(self, error: BaseException | None = None, *, timeout: float | None = None) -> None:
        """Finish: see `CheckpointManager.close`. A second call does nothing.

        Args:
            error: What ends the training. The ranks write a rescue checkpoint first, if all of them come here at the
                same step.
            timeout: Seconds to wait at most: rank 0 for its writer and the mirror, the other ranks for their writers.
        """
        if self._is_closed:
            return
        may_rescue = self._has_state and self._view.rescues and not isinstance(error, ConflictError)
        if error is not None and may_rescue:
            self._rescue_together(error, timeout)
        self._is_closed = True
        try:
            with contextlib.ExitStack() as closing:
                if self._own_ranks is not None:
                    closing.callback(self._own_ranks.close)
                if self._io.writer is not None:
                    closing.callback(self._io.writer.close, timeout)
                if self.manager is not None:
                    closing.callback(self.manager.close, timeout=timeout)
        except (SaveError, ConflictError) as failure:
            if error is None:
                raise
            # The error that ended the training must be the one that is raised.
            warn(str(failure))

    def _rescue_together(self, error: BaseException, timeout: float | None) -> None:
        """Rescue if all ranks come here at the same step."""
        step = self._last_report[0]
        with failures_as_warnings("no rescue checkpoint could be written"):
            if not all_come(self._ranks, self._last_report):
                msg = f"no rescue checkpoint: not all ranks reached step {step} within {BARRIER_S:g} s"
                warn(msg)
                return
            self.rescue(f"{type(error).__name__}: {error}", timeout=timeout)

    def _check_open(self) -> None:
        if self._is_closed:
            msg = "the manager is closed; make another one for the same directory and restore()"
            raise ClosedError(msg)

    def __enter__(self) -> DistributedManager:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close(error)

    def __repr__(self) -> str:
        own = self.manager or "led by rank 0"
        return f"<DistributedManager: rank {self._ranks.rank} of {self._ranks.size}, {own}>"


RankedManager = DistributedManager
"""The earlier name."""


def _versions() -> dict[str, str]:
    """Return the versions of the code that communicates, or writes and reads shards."""
    packages = {name: sys.modules.get(name) for name in ("checkpointer", "torch")}
    return {f"version of {name}": str(getattr(module, "__version__", "")) for name, module in packages.items()}


def _text_of(policy: Policy | None) -> str | None:
    """Return a policy as text; None if it is left to rank 0, or has code whose text may be another in each process."""
    if policy is None:
        return None
    try:
        policy.to_yaml()
    except Exception:  # A user's rule.
        return None
    return re.sub(r" at 0x[0-9a-f]+", "", repr(policy))


def find(manager: DistributedManager, which: str | int | None = None) -> Record | None:
    """Return the record that `restore` would try first, on every rank: see `checkpointer.session.Session.find`."""
    return manager._on_rank_zero(lambda own: own.session.find(which))
