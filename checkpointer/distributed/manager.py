"""One manager for several processes: rank 0 decides, all take and write what is theirs, and they seldom talk."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import attrs

from checkpointer._validation import check_function
from checkpointer.clock import SystemClock
from checkpointer.distributed.ranks import Agreement, OneRank, Team, TorchRanks
from checkpointer.distributed.shard_writer import NumberedCopies, NumberedCopy, ShardWriter
from checkpointer.errors import CheckpointerError, CheckpointerWarning, ClosedError, PolicyError, SaveError
from checkpointer.formats import open_format
from checkpointer.manager import CheckpointManager, check_options
from checkpointer.policy.decide import Decision, Skip
from checkpointer.policy.policy import Policy
from checkpointer.policy.triggers import Horizon
from checkpointer.ports import Clock, FolderFormat, Format, Mailbox, Ranks, Snapshotting, Storage, SupportsMailbox
from checkpointer.records.record import Record
from checkpointer.restore.load import Restored, load
from checkpointer.save.background import as_busy, copies_of
from checkpointer.storage import open_storage
from checkpointer.storage.owner import new_owner, release

if TYPE_CHECKING:
    from checkpointer.formats.dcp_folder import DcpFormat

__all__ = ["DistributedManager", "RankedManager"]

MEET_S = 1.0
"""Seconds that an error waits for the other ranks to come to a rescue."""


@attrs.frozen
class _Broadcast:
    """What rank 0 tells the others at the end of whatever it did."""

    horizon: Horizon
    best: Record | None
    last: Record | None
    rescues: bool
    decision: Decision
    record: Record | None = None
    is_done: bool = True


_NOTHING = Skip(reason="nothing was asked")


class DistributedManager:
    """A `CheckpointManager` for a training of several processes; each of them makes one, and calls it alike.

    Rank 0 has the manager: it alone decides, and touches the directory. What it decides reaches the others in one
    small broadcast; an observation that cannot be due costs none. Every rank's ``state`` is called, for taking it may
    be a collective. With ``format="dcp"`` each rank writes and reads its own shards, and the checkpoint counts once
    all have; with another format rank 0 writes what it has, and every rank reads that.

    Args:
        directory: As for `CheckpointManager`; all ranks name the same one.
        policy: When to save and what to keep; rank 0's counts.
        ranks: The processes; None takes those of ``torch.distributed``'s default group.
        state: Returns the state to save: a dict, sharded (DTensor) as the training has it, for ``format="dcp"``.
            A restore reads into what it returns.
        format: ``"dcp"`` for sharded state, or as for `CheckpointManager`.
        storage_options: As for `CheckpointManager`.
        clock: Where rank 0 has the time from.
        **options: What else `CheckpointManager` takes.

    Raises:
        PolicyError: For an option that `CheckpointManager` does not have.
        RanksError: If there is no process group.

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
        format: str | Format | FolderFormat = "torch",
        storage_options: Mapping[str, Any] | None = None,
        clock: Clock | None = None,
        **options: Any,
    ) -> None:
        check_options(options, type(self).__name__)
        check_function(state, "state=", PolicyError)
        self._own_ranks = TorchRanks() if ranks is None else None
        self._ranks: Ranks = self._own_ranks or ranks or OneRank()
        self._where = directory, storage_options
        self._state = state
        self._clock = clock or SystemClock()
        self._agreement = Agreement(self._ranks)
        acts: dict[str, Callable[..., None]] = {
            "take": self._take,
            "write": self._write,
            "read": self._read,
            "copy": self._copy,
        }
        self._team = Team(self._ranks, acts)
        self._payload = self._open_format(format)
        busy = as_busy(options.get("background"))
        self._behind: ShardWriter | None = None
        if busy is not None and isinstance(self._payload, FolderFormat):
            self._behind = self._open_behind(format, copies_of(busy))
        self._taken: Any = None
        self._loaded: Any = None
        self._manager: CheckpointManager | None = None
        self._seen = -1, 0
        self._closed = False

        def open_it() -> _Broadcast:
            self._manager = CheckpointManager(
                directory,
                policy,
                state=self._take_all if state is not None else None,
                format=self._called(),
                storage_options=storage_options,
                clock=self._clock,
                **options,
            )
            return self._tell()

        self._heed(self._team.work(open_it))

    def _open_format(self, format: str | Format | FolderFormat) -> Format | FolderFormat:
        if format != "dcp":
            return open_format(format, self._where[1])
        template = None if self._state is None else lambda: self._taken
        return _dcp(getattr(self._ranks, "group", None), template, self._where[1])

    def _open_behind(self, format: str | Format | FolderFormat, copies: int) -> ShardWriter:
        if format != "dcp":
            msg = (
                f"format is a {type(format).__name__} that all ranks write, and background= is there for format='dcp' "
                "alone: nobody knows in which process group another one talks; leave background= out, or pass 'dcp'"
            )
            raise PolicyError(msg)
        mailbox: Mailbox | None = None
        if self._ranks.size > 1:
            if not isinstance(self._ranks, SupportsMailbox):
                msg = (
                    f"background= with format='dcp' needs ranks whose threads can work together, as TorchRanks do, and "
                    f"{type(self._ranks).__name__} has no mailbox(); leave background= out"
                )
                raise PolicyError(msg)
            mailbox = self._ranks.mailbox()
        group = None if mailbox is None else mailbox.group
        payload = _dcp(group, None, self._where[1])
        return ShardWriter(self._ranks.rank, mailbox, payload, payload.snapshots(copies), copies)

    # What all ranks are called for

    def _take(self) -> None:
        assert self._state is not None, "rank 0 has one"
        self._taken = self._state()
        if self._ranks.rank and not isinstance(self._payload, FolderFormat):
            self._taken = None  # Rank 0 writes what it has.

    def _write(self, path: str) -> None:
        assert isinstance(self._payload, FolderFormat), "it is called for a folder"
        self._payload.write_folder(self._taken, path)

    def _read(self, path: str, options: Mapping[str, Any]) -> None:
        assert isinstance(self._payload, FolderFormat), "it is called for a folder"
        self._loaded = self._payload.read_folder(path, **options)

    def _copy(self, number: int) -> None:
        assert self._behind is not None, "it is called for a save in the background"
        self._behind.copy(number, self._taken)

    def _take_all(self) -> Any:
        self._team.call("take")
        return self._taken

    def _write_all(self, path: str) -> None:
        self._team.call("write", path)

    def _read_all(self, path: str, options: Mapping[str, Any]) -> Any:
        if self._state is not None:
            self._team.call("take")
        self._team.call("read", path, options)
        return self._loaded

    def _called(self) -> Format | FolderFormat:
        """Return the format of rank 0's manager."""
        payload, behind = self._payload, self._behind
        if not isinstance(payload, FolderFormat):
            return payload
        if behind is None:
            return _Called(payload, self._write_all, self._read_all)
        copies = NumberedCopies(behind, lambda number: self._team.call("copy", number))
        return _CalledBehind(payload, self._write_all, self._read_all, behind, copies)

    def _tell(
        self, decision: Decision | None = None, record: Record | None = None, *, is_done: bool = True
    ) -> _Broadcast:
        """Return what all ranks have to know, on rank 0."""
        manager = self._own_manager
        return _Broadcast(
            manager.session.horizon,
            manager.best,
            manager.last,
            manager.policy.rescue,
            _NOTHING if decision is None else decision,
            record,
            is_done,
        )

    def _heed(self, told: _Broadcast) -> _Broadcast:
        self._told = told
        self._taken = self._loaded = None
        self._quiet = Skip(reason=f"not due{told.horizon.text()}")
        return told

    @property
    def _own_manager(self) -> CheckpointManager:
        assert self._manager is not None, "this is rank 0"
        return self._manager

    # The hot path

    def observe(
        self, metrics: Mapping[str, Any], step: int, epoch: int, *, epoch_end: bool | None = None, due: str = ""
    ) -> Decision:
        """Report what happened, on every rank alike, and save if that is due: see `CheckpointManager.observe`.

        Rank 0's metrics count. Costs no communication unless something can be due; under a time trigger the ranks
        talk every few steps, see `checkpointer.distributed.ranks.Agreement`.
        """
        newest, at = self._seen
        if newest <= step:
            self._seen = (step, epoch)
            if not due and newest < step and self._is_quiet(step, epoch, epoch_end):
                return self._quiet

        def observe(manager: CheckpointManager) -> Decision:
            if step < newest:  # The manager does not know the quiet reports, and has to judge an older step by them.
                manager.observe({}, newest, at, epoch_end=False)
            return manager.observe(metrics, step, epoch, epoch_end=epoch_end, due=due)

        return self._ask(observe)

    def _is_quiet(self, step: int, epoch: int, epoch_end: bool | None) -> bool:
        horizon = self._told.horizon
        if step >= horizon.step or self._closed:
            return False
        if horizon.epochs != math.inf and (epoch_end is None or epoch + epoch_end >= horizon.epochs):
            return False
        # Clocks differ: rank 0's counts.
        return horizon.time == math.inf or not self._agreement(
            self._ranks.rank == 0 and self._clock.time() >= horizon.time
        )

    def _ask(self, act: Callable[[CheckpointManager], Decision]) -> Decision:
        self._check_open()
        return self._heed(self._team.work(lambda: self._tell(act(self._own_manager)))).decision

    def rescue(self, reason: str = "asked for", *, timeout: float | None = None) -> Decision:
        """Save now, outside the policy, on all ranks together: see `CheckpointManager.rescue`."""
        step, epoch = self._seen
        if step < 0:
            return Skip(reason="nothing was observed since the start, so there is nothing new to rescue")
        return self._ask(lambda manager: manager.rescue(reason, step=step, epoch=epoch, timeout=timeout))

    # Restoring

    def restore(
        self,
        which: str | int | None = None,
        *,
        weights_only: bool = True,
        map_location: Any = "cpu",
        contents: Literal["full", "any"] = "full",
    ) -> Restored | None:
        """Verify and load a checkpoint on all ranks together: see `CheckpointManager.restore`.

        Rank 0 chooses and verifies. A file is read by each rank that sees it, and sent by rank 0 to the others; a
        folder of shards is read by all together, whatever number of ranks wrote it.
        """
        self._check_open()
        options: dict[str, Any] = {"weights_only": weights_only, "map_location": map_location}
        here: Restored | None = None

        def restore() -> _Broadcast:
            nonlocal here
            here = self._own_manager.restore(which, contents=contents, **options)
            return self._tell(record=here.record if here else None)

        told = self._team.work(restore)
        record, loaded = told.record, self._loaded
        self._heed(told)
        if record is None:
            return None
        self._seen = record.step if record.step else -1, record.epoch
        if record.format == self._payload.name and isinstance(self._payload, FolderFormat):
            return here or Restored(record=record, state=loaded)
        return self._share(record, here, options)

    def _share(self, record: Record, here: Restored | None, options: Mapping[str, Any]) -> Restored:
        """Return a checkpoint that rank 0 has read, on each rank."""
        if here is None:
            here = self._load(record, options)
        if all(self._ranks.gather(here is not None)):
            assert here is not None, "all have it"
            return here
        state = self._ranks.broadcast(here.state if here is not None else None)
        return here or Restored(record=record, state=state)

    def _load(self, record: Record, options: Mapping[str, Any]) -> Restored | None:
        """Return the checkpoint if this rank sees what rank 0 sees."""
        directory, storage_options = self._where
        owner = new_owner()
        try:
            storage = open_storage(directory, owner, storage_options)
            return load(storage, lambda record: open_format(record.format, storage_options), record, **options)
        except (CheckpointerError, OSError):
            return None
        finally:
            release(owner)

    # Looking

    @property
    def manager(self) -> CheckpointManager | None:
        """Rank 0's manager; None on the others."""
        return self._manager

    @property
    def best(self) -> Record | None:
        """The best checkpoint, on every rank: see `CheckpointManager.best`."""
        return self._told.best

    @property
    def last(self) -> Record | None:
        """The newest checkpoint, on every rank: see `CheckpointManager.last`."""
        return self._told.last

    # Managing

    def wait(self, timeout: float | None = None) -> bool:
        """Wait on all ranks until what is being saved in the background is durable: see `CheckpointManager.wait`."""
        self._check_open()
        return self._heed(self._team.work(lambda: self._tell(is_done=self._own_manager.wait(timeout)))).is_done

    def close(self, error: BaseException | None = None, *, timeout: float | None = None) -> None:
        """Finish: see `CheckpointManager.close`. A second call does nothing.

        Args:
            error: What ends the training. The ranks write a rescue checkpoint first, if all of them come here at the
                same step.
            timeout: Seconds to wait at most: rank 0 for its writer and the mirror, the other ranks for their writers.
        """
        if self._closed:
            return
        if error is not None and self._state is not None and self._told.rescues:
            self._rescue_quietly(error, timeout)
        self._closed = True
        try:
            with contextlib.ExitStack() as closing:
                if self._own_ranks is not None:
                    closing.callback(self._own_ranks.close)
                if self._behind is not None:
                    closing.callback(self._behind.close, timeout)
                if self._manager is not None:
                    closing.callback(self._manager.close, timeout=timeout)
        except SaveError as failure:
            if error is None:
                raise
            # The error that ended the training is the one to be seen.
            warnings.warn(str(failure), CheckpointerWarning, stacklevel=3)

    def __enter__(self) -> DistributedManager:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close(error)

    def _rescue_quietly(self, error: BaseException, timeout: float | None) -> None:
        """Rescue if all ranks come here at the same step: the others may be waiting for this one elsewhere."""
        try:
            if not self._ranks.barrier(MEET_S) or 1 != len(set(self._ranks.gather(self._seen))):
                msg = "no rescue checkpoint: that takes all ranks at the same step, and they did not come"
                warnings.warn(msg, CheckpointerWarning, stacklevel=4)
                return
            self.rescue(f"{type(error).__name__}: {error}", timeout=timeout)
        except Exception as failure:  # The error that ended the training is the one to be seen.
            msg = f"no rescue checkpoint could be written: {failure!r}"
            warnings.warn(msg, CheckpointerWarning, stacklevel=4)

    def __repr__(self) -> str:
        return (
            f"<DistributedManager: rank {self._ranks.rank} of {self._ranks.size}, {self._manager or 'led by rank 0'}>"
        )

    def _check_open(self) -> None:
        if self._closed:
            msg = "the manager is closed; make another one for the same directory and restore()"
            raise ClosedError(msg)


@attrs.frozen
class _Called:
    """Rank 0's format: for each folder it calls all ranks."""

    payload: FolderFormat
    write: Callable[[str], None]
    read: Callable[[str, Mapping[str, Any]], Any]

    @property
    def name(self) -> str:
        return self.payload.name

    @property
    def extension(self) -> str:
        return self.payload.extension

    def write_folder(self, state: Any, path: str) -> None:
        self.write(path)

    def read_folder(self, path: str, **options: Any) -> Any:
        return self.read(path, options)

    def refused(self, state: Any) -> Mapping[str, str]:
        return self.payload.refused(state)


@attrs.frozen
class _CalledBehind(_Called):
    """Rank 0's format where states are written behind the training: the other ranks are called to copy theirs."""

    behind: ShardWriter
    copies: NumberedCopies

    def snapshots(self, copies: int) -> Snapshotting:
        return self.copies

    def write_folder(self, state: Any, path: str) -> None:
        if isinstance(state, NumberedCopy):
            self.behind.write(state.number, path)
        else:
            self.write(path)

    def refused(self, state: Any) -> Mapping[str, str]:
        here = self.behind.state(state.number) if isinstance(state, NumberedCopy) else state
        return self.payload.refused(here)


def _dcp(group: Any, template: Callable[[], Any] | None, storage_options: Mapping[str, Any] | None) -> DcpFormat:
    from checkpointer.formats.dcp_folder import DcpFormat

    return DcpFormat(group, template, storage_options)


RankedManager = DistributedManager
"""The earlier name."""
