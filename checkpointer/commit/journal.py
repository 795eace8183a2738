"""The record files of one directory: one writer reads, announces and replaces them, signed if there is a key."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import attrs

from checkpointer.commit.index import read_entry, record_path
from checkpointer.commit.signing import HMACKey, signed
from checkpointer.errors import NameTakenError, RecordError
from checkpointer.ports import Storage, Upload
from checkpointer.records.codec import to_json
from checkpointer.records.record import Entry, Record
from checkpointer.storage.digests import ALGORITHM, CRYPTOGRAPHIC, size_of

__all__ = ["Journal", "aborting"]


@attrs.define
class Journal:
    """Reads and writes record files. Each write takes effect in one step."""

    storage: Storage
    owner: str
    """Id of the writer."""
    trust: HMACKey | None = None
    """Signs each record and alias marker. A file without its signature counts as damaged."""
    unfinished: dict[str, Record] = attrs.field(factory=dict, init=False)
    """Retired checkpoints whose payload could not be deleted yet."""

    @property
    def algorithm(self) -> str:
        """The digest of new payloads. With a key it is one that cannot be forged."""
        return ALGORITHM if self.trust is None else CRYPTOGRAPHIC

    def read(self, name: str) -> Entry | None:
        """Return the entry of this name as it is now, or None. Raises `RecordError` if it is damaged."""
        try:
            return read_entry(self.storage, record_path(name), self.trust)
        except FileNotFoundError:
            return None

    def find(self, name: str) -> Entry | None:
        """Do as `read`, but return None if the record is damaged."""
        with contextlib.suppress(RecordError):
            return self.read(name)
        return None

    def has_record(self, name: str) -> bool:
        """Return whether this record file exists, damaged or not. A listing may not show it yet."""
        try:
            return self.read(name) is not None
        except RecordError:
            return True

    def has_payload(self, record: Record) -> bool:
        """Return whether a payload of the recorded size exists. Reads no bytes."""
        return size_of(self.storage, record.name, record.size) == record.size

    def put(self, entry: Entry) -> None:
        """Write or replace a record file."""
        self.storage.write(record_path(entry.record.name), self._encode(entry))

    def announce(self, record: Record, previous: Record | None = None, *, is_new: bool) -> Entry:
        """Write a pending record. If two writers create the same new name, `NameTakenError` stops the second one."""
        pending = Entry(record=record, status="pending", previous=previous, owner=self.owner)
        if not is_new:
            self.put(pending)
            return pending
        try:
            with aborting(self.storage.upload(record_path(record.name))) as upload:
                upload.write(self._encode(pending))
                upload.finish()
                upload.publish(replace=False)
        except FileExistsError as error:
            msg = f"another manager is writing {record.name}; nothing was replaced"
            raise NameTakenError(msg) from error
        return pending

    def delete(self, name: str) -> None:
        """Delete a record file; does nothing if it does not exist."""
        self.storage.delete(record_path(name))

    def _encode(self, entry: Entry) -> bytes:
        return to_json(signed(entry.to_dict(), self.trust))


@contextlib.contextmanager
def aborting(upload: Upload) -> Iterator[Upload]:
    """Remove what an upload has staged and not published, when the block ends."""
    try:
        yield upload
    finally:
        upload.abort()
