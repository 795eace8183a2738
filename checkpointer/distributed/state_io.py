"""The state of a training of several processes: all ranks take, write and read it together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from checkpointer._secrets import Secrets
from checkpointer.distributed.shard_writer import NumberedCopy, ShardWriter
from checkpointer.distributed.team import Team
from checkpointer.errors import PolicyError
from checkpointer.formats import open_format
from checkpointer.ports import FolderFormat, Format, Mailbox, Ranks, SupportsFileDigests, SupportsMailbox
from checkpointer.records.digest_algorithms import ALGORITHM
from checkpointer.save.background import Busy, copies_of

if TYPE_CHECKING:
    from checkpointer.formats.dcp_folder import DcpFormat


class StateIO:
    """Takes, writes and reads a state on all ranks, when rank 0's manager asks for it.

    If a checkpoint is a folder, this is the format of rank 0's manager. If it is a file, rank 0 writes it alone.
    ``state`` returns this rank's state, and ``weights`` its weights alone, which are saved if rank 0 has
    ``takes_weights``. The other arguments are as for `DistributedManager`.

    Raises:
        PolicyError: If these ranks, or this format, cannot write in the background.
    """

    def __init__(
        self,
        ranks: Ranks,
        state: Callable[[], Any] | None,
        format: str | Format | FolderFormat,
        *,
        weights: Callable[[], Any] | None,
        takes_weights: bool,
        storage_options: Mapping[str, Any] | None,
        background: Busy | None,
    ) -> None:
        self._ranks, self._state, self._weights = ranks, state, weights
        self._takes_weights = takes_weights and weights is not None
        self.team = Team(ranks, {"take": self._take, "write": self._write, "read": self._read, "copy": self._copy})
        self._num_copies = 0
        self._taken: Any = None
        self._written: Mapping[str, tuple[int, str]] | None = None
        """On rank 0: the files of the folder that was written last."""
        self.loaded: Any = None
        """What this rank has read."""
        self.writer: ShardWriter | None = None
        if format == "dcp":
            template = None if state is None else lambda: self._taken
            self.payload: Any = _dcp(getattr(ranks, "group", None), template, storage_options)
        else:
            self.payload = open_format(format, storage_options)
        self.name, self.extension = self.payload.name, self.payload.extension
        self.is_folder = isinstance(self.payload, FolderFormat)
        if background is not None and self.is_folder:
            self.writer = _open_writer(ranks, format, storage_options, copies_of(background))

    @property
    def format(self) -> Any:
        """The format of rank 0's manager."""
        return self if self.is_folder else self.payload

    def capture(self) -> Any:
        """Let all ranks take their states, and return rank 0's. For rank 0's manager, as are the methods below."""
        self.team.call("take", self._takes_weights)
        return self._taken

    def forget(self) -> None:
        """Release what was taken and read."""
        self._taken = self.loaded = None

    # The ports FolderFormat, SupportsSnapshots and Snapshotting, on rank 0

    def write_folder(self, state: Any, path: str) -> None:
        """See `FolderFormat.write_folder`."""
        self.write_digested(state, path, algorithm=ALGORITHM)

    def write_digested(self, state: Any, path: str, *, algorithm: str) -> Mapping[str, tuple[int, str]] | None:
        """See `SupportsFileDigests.write_digested`."""
        if isinstance(state, NumberedCopy):
            return state.writer.write(state.number, path, algorithm)
        self.team.call("write", path, algorithm)
        return self._written

    def read_verified(self, path: str, **options: Any) -> Any:
        """See `SupportsFileDigests.read_verified`."""
        return self.read_folder(path, **options)

    def read_folder(self, path: str, **options: Any) -> Any:
        """See `FolderFormat.read_folder`."""
        if self._state is not None:
            self.team.call("take", False)
        self.team.call("read", path, options)
        return self.loaded

    def refused(self, state: Any) -> Mapping[str, str]:
        """See `FolderFormat.refused`."""
        here = state.writer.state(state.number) if isinstance(state, NumberedCopy) else state
        refused: Mapping[str, str] = self.payload.refused(here)
        return refused

    def snapshots(self, copies: int) -> StateIO:
        """See `SupportsSnapshots.snapshots`."""
        return self

    def take(self, state: Any) -> NumberedCopy:
        """See `Snapshotting.take`: all ranks copy their parts under one number."""
        assert self.writer is not None, "the manager saves in the background"
        self._num_copies += 1
        copy = NumberedCopy(self._num_copies, self.writer)
        try:
            self.team.call("copy", copy.number)
        except BaseException:
            copy.release()
            raise
        return copy

    # What all ranks are called for

    def _take(self, takes_weights: bool) -> None:
        take = self._weights if takes_weights else self._state
        assert take is not None, "rank 0 has one"
        self._taken = take()
        if self._ranks.rank and not self.is_folder:
            self._taken = None  # Rank 0 writes its own.

    def _write(self, path: str, algorithm: str) -> None:
        self._written = None
        with Secrets(path, {}).hidden():
            if isinstance(self.payload, SupportsFileDigests):
                self._written = self.payload.write_digested(self._taken, path, algorithm=algorithm)
            else:
                self.payload.write_folder(self._taken, path)

    def _read(self, path: str, options: Mapping[str, Any]) -> None:
        read = self.payload.read_verified if "files" in options else self.payload.read_folder
        with Secrets(path, {}).hidden():
            self.loaded = read(path, **options)

    def _copy(self, number: int) -> None:
        assert self.writer is not None, "the manager saves in the background"
        self.writer.copy(number, self._taken)


def _open_writer(ranks: Ranks, format: object, storage_options: Mapping[str, Any] | None, copies: int) -> ShardWriter:
    if format != "dcp":
        msg = (
            f"format is a {type(format).__name__} that all ranks write, and background= works with format='dcp' "
            "alone: the process group of another format is not known; leave background= out, or pass 'dcp'"
        )
        raise PolicyError(msg)
    mailbox: Mailbox | None = None
    if ranks.size > 1:
        if not isinstance(ranks, SupportsMailbox):
            msg = (
                f"background= with format='dcp' needs ranks whose threads can work together, as TorchRanks do, and "
                f"{type(ranks).__name__} has no mailbox(); leave background= out"
            )
            raise PolicyError(msg)
        mailbox = ranks.mailbox()
    payload = _dcp(None if mailbox is None else mailbox.group, None, storage_options)
    return ShardWriter(ranks.rank, mailbox, payload, payload.snapshots(copies), copies)


def _dcp(group: Any, template: Callable[[], Any] | None, storage_options: Mapping[str, Any] | None) -> DcpFormat:
    from checkpointer.formats.dcp_folder import DcpFormat

    return DcpFormat(group, template, storage_options)
