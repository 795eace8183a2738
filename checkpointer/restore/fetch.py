"""Fetches checkpoints from a mirror that the directory does not have, or has only damaged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import attrs

from checkpointer._display import size_text
from checkpointer.commit.directory import Directory
from checkpointer.errors import CorruptError, RestoreError, StorageError, warn
from checkpointer.ports import Storage, SupportsFreeSpace
from checkpointer.records.record import Record
from checkpointer.restore.fallback import raising_unreachable
from checkpointer.restore.load import Restored, verify

_log = logging.getLogger("checkpointer")


@attrs.frozen(kw_only=True)
class MirrorSnapshot:
    """The contents of a mirror when a restore looked, and a way to fetch them."""

    storage: Storage | None = None
    records: Mapping[str, Record] = attrs.field(factory=dict)
    """Its records by token."""
    problems: tuple[str, ...] = ()
    """Messages about what could not be read."""

    def load(self, directory: Directory, load: Callable[[Record], Restored], record: Record) -> Restored:
        """Load a checkpoint from the directory. If only the mirror has it whole, fetch it first.

        Raises:
            CorruptError: If no copy is as it was written.
            RestoreError: If it has to be fetched, and there is no room.
            StorageError: If the fetch failed.
        """
        copy = self.records.get(record.token)
        here = {other.token for other in (*directory.manifest.records, *directory.manifest.aside)}
        with raising_unreachable(record, directory.storage):
            if copy is not None and record.token not in here:
                return load(self._fetch(copy, directory))
            try:
                return load(record)
            except (CorruptError, OSError) as error:
                if copy is None or _is_whole(directory.storage, record):
                    raise
                fetched = self._fetch_again(record, copy, directory, error)
                msg = f"{error}; it was fetched from the mirror as {fetched.name}"
                warn(msg)
            return load(fetched)

    def _fetch(self, copy: Record, directory: Directory, *, replaces: Record | None = None) -> Record:
        assert self.storage is not None, "a record was read from it"
        storage = directory.storage
        free = storage.free_space() if isinstance(storage, SupportsFreeSpace) else None
        if free is not None and free < copy.size:
            msg = (
                f"{copy.name} has to be fetched from {self.storage} and takes {size_text(copy.size)}, but {storage} "
                f"has {size_text(free)} free; nothing was restored. Free some space, or restore a smaller one by name"
            )
            raise RestoreError(msg)
        directory.contents.prepare()
        try:
            fetched = directory.copy_in(copy, self.storage, copy.name, replaces=replaces)
        except CorruptError:
            raise
        except Exception as error:  # Each driver has its own errors. An older checkpoint may be here.
            msg = f"{copy.name} could not be fetched from {self.storage} ({type(error).__name__}: {error})"
            raise StorageError(msg) from error
        _log.info("fetched %s (%s) from %s", fetched.name, size_text(fetched.size), self.storage)
        return fetched

    def _fetch_again(self, record: Record, copy: Record, directory: Directory, error: Exception) -> Record:
        """Fetch a checkpoint that is damaged here. Replace the file only if its size is that of our payload."""
        files = directory.storage.list(record.name)
        is_ours = not files or (set(files) == {record.name} and files[record.name].size == record.size)
        try:
            fetched = self._fetch(copy, directory, replaces=record if is_ours else None)
        except (CorruptError, OSError) as failure:
            msg = f"{error}; {failure}"
            raise (CorruptError if isinstance(error, CorruptError) else StorageError)(msg) from error
        if not is_ours:
            directory.names.disown(record)
        return fetched


def _is_whole(storage: Storage, record: Record) -> bool:
    try:
        verify(storage, record)
    except (CorruptError, OSError):
        return False
    return True
