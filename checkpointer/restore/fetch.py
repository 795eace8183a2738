"""Gets from a mirror what a restore needs and the directory has not, or has no more as it was written."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Literal

import attrs

from checkpointer.commit.directory import Directory
from checkpointer.errors import (
    CheckpointerWarning,
    CorruptError,
    NotFoundError,
    RecordError,
    RestoreError,
    StorageError,
)
from checkpointer.policy.policy import Policy
from checkpointer.ports import Storage, SupportsFreeSpace
from checkpointer.records.manifest import Manifest
from checkpointer.records.record import Record
from checkpointer.restore.load import Restored, choose, holding_on_to, verify

__all__ = ["MirrorSnapshot"]

_log = logging.getLogger("checkpointer")


@attrs.frozen(kw_only=True)
class MirrorSnapshot:
    """What a mirror held when a restore looked, and how to get it."""

    storage: Storage | None = None
    records: Mapping[str, Record] = attrs.field(factory=dict)
    """Its records by token."""
    problems: tuple[str, ...] = ()
    """What could not be read, in words."""

    def choose(
        self,
        which: str | int | None,
        policy: Policy,
        view: Manifest,
        contents: Literal["full", "any"],
        damaged: Mapping[str, RecordError],
    ) -> tuple[Record, ...]:
        """Do as `restoring.choose` does; what is not found may be where nobody could look."""
        try:
            return choose(which, policy, view, contents, damaged=damaged)
        except NotFoundError as error:
            if not self.problems:
                raise
            msg = f"{error}; not looked at: {'; '.join(self.problems)}"
            raise NotFoundError(msg) from error

    def load(self, directory: Directory, load: Callable[[Record], Restored], record: Record) -> Restored:
        """Load a checkpoint from here; before that fetch it if only the mirror has it whole.

        Raises:
            CorruptError: If no copy is what was written.
            RestoreError: If it has to be fetched, and there is no room.
            StorageError: If fetching it failed.
        """
        copy = self.records.get(record.token)
        here = (*directory.manifest.records, *directory.manifest.aside)
        with holding_on_to(record, directory.storage):
            if copy is not None and record.token not in {other.token for other in here}:
                return load(self._fetch(copy, directory))
            try:
                return load(record)
            except (CorruptError, OSError) as error:
                if copy is None or _is_whole(directory.storage, record):
                    raise
                fetched = self._fetch_again(record, copy, directory, error)
                msg = f"{error}; it was fetched from the mirror as {fetched.name}"
                warnings.warn(msg, CheckpointerWarning, stacklevel=3)
            return load(fetched)

    def _fetch(self, copy: Record, directory: Directory, *, replaces: Record | None = None) -> Record:
        assert self.storage is not None, "a record was read from it"
        self._check_space(copy, directory.storage)
        directory.prepare()
        try:
            fetched = directory.copy_in(copy, self.storage, copy.name, replaces=replaces)
        except CorruptError:
            raise
        except Exception as error:  # Each driver has its own, and an older checkpoint may do.
            msg = f"{copy.name} could not be fetched from {self.storage} ({type(error).__name__}: {error})"
            raise StorageError(msg) from error
        directory.add(fetched)
        _log.info("fetched %s (%d bytes) from %s", fetched.name, fetched.size, self.storage)
        return fetched

    def _fetch_again(self, record: Record, copy: Record, directory: Directory, error: Exception) -> Record:
        """Fetch what is damaged here. Only a file of the size we wrote is surely ours to replace."""
        files = directory.storage.list(record.name)
        is_ours = not files or (set(files) == {record.name} and files[record.name].size == record.size)
        try:
            fetched = self._fetch(copy, directory, replaces=record if is_ours else None)
        except (CorruptError, OSError) as failure:
            msg = f"{error}; {failure}"
            raise (CorruptError if isinstance(error, CorruptError) else StorageError)(msg) from error
        if is_ours:
            return fetched
        # What lies there is not what the record says; it stays, but as a file of others.
        directory.disown(record)
        return fetched

    def _check_space(self, copy: Record, storage: Storage) -> None:
        free = storage.free_space() if isinstance(storage, SupportsFreeSpace) else None
        if free is not None and free < copy.size:
            msg = (
                f"{copy.name} has to be fetched from {self.storage} and takes {copy.size} bytes, but {storage} has "
                f"{free} free; nothing was restored. Free some space, or restore a smaller one by name"
            )
            raise RestoreError(msg)


def _is_whole(storage: Storage, record: Record) -> bool:
    try:
        verify(storage, record)
    except (CorruptError, OSError):
        return False
    return True
