"""The record files of one directory: one writer reads, announces and replaces them, signed if there is a key."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import attrs

from checkpointer.commit.changes import Changes, clear_changes, write_changes
from checkpointer.commit.index import read_entry, record_path
from checkpointer.commit.lease import Lease, claim_term
from checkpointer.commit.signing import HMACKey, signed
from checkpointer.commit.terms import Term
from checkpointer.errors import FencedError, NameTakenError, RecordError
from checkpointer.ports import Storage, SupportsLinks, Upload
from checkpointer.records.codec import to_json
from checkpointer.records.digest_algorithms import ALGORITHM, CRYPTOGRAPHIC
from checkpointer.records.record import Entry, Record
from checkpointer.storage.digests import size_of
from checkpointer.storage.owner import is_dead, is_live


@attrs.define
class Journal:
    """Reads and writes record files. Each write takes effect in one step."""

    storage: Storage
    owner: str
    """Id of the writer."""
    trust: HMACKey | None = None
    """Signs each record and alias marker. A file without its signature counts as damaged."""
    term: Term | None = attrs.field(default=None, init=False)
    """What this writer holds of the run. If another one takes over, each announced change raises `FencedError`."""
    unfinished: dict[str, Entry] = attrs.field(factory=dict, init=False)
    """Announced changes that failed: retired checkpoints that could not be deleted, replacements that may be done."""

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
            if self.read(name) is not None:
                return True
        except RecordError:
            return True
        # A link that leads nowhere, or a pipe, has no record; but no record can be created under its name.
        return self.is_near and bool(self.storage.list(record_path(name)))

    @property
    def is_near(self) -> bool:
        """Whether a look at a file costs no request."""
        return isinstance(self.storage, SupportsLinks)

    def has_payload(self, record: Record) -> bool:
        """Return whether a payload of the recorded size exists. Reads no bytes."""
        return size_of(self.storage, record.name, record.size) == record.size

    def pending(self, record: Record, previous: Record | None = None) -> Entry:
        """Return the announcement that a payload is written, or replaced if there is a ``previous`` one."""
        return Entry(record=record, status="pending", previous=previous, owner=self.owner)

    def retiring(self, record: Record) -> Entry:
        """Return the announcement that a checkpoint is removed."""
        return Entry(record=record, status="retired", owner=self.owner)

    def put(self, entry: Entry) -> None:
        """Write or replace a record file."""
        self.storage.write(record_path(entry.record.name), self._encode(entry))

    def announce(self, pending: Entry) -> None:
        """Create the record of a new name. If two writers create it, `NameTakenError` stops the second one."""
        try:
            with aborting(self.storage.upload(record_path(pending.record.name))) as upload:
                upload.write(self._encode(pending))
                upload.finish()
                upload.publish(replace=False)
        except FileExistsError as error:
            msg = f"another manager is writing {pending.record.name}; nothing was replaced"
            raise NameTakenError(msg) from error

    @contextlib.contextmanager
    def changing(self, *entries: Entry, aliases: Iterable[str] = ()) -> Iterator[set[str]]:
        """Announce that existing names are about to change, and check that this writer may change them.

        If the block raises, or adds a name to the set that it gets, that change stays announced as unfinished.

        Raises:
            FencedError: If another process has taken over the run. Then nothing has changed.
        """
        announced = {entry.record.name: entry for entry in entries}
        aliases, before = tuple(aliases), self.unfinished
        failed: set[str] = set()
        if not (announced or before or aliases):
            yield failed
            return
        self._write_changes({**before, **announced}, aliases)
        try:
            self.check_term()
        except FencedError:
            self._write_changes(before)
            raise
        self.unfinished = {**before, **announced}
        try:
            yield failed
        except Exception:
            with contextlib.suppress(OSError):
                self._write_changes(self.unfinished)
            raise
        self.unfinished = {
            name: entry for name, entry in self.unfinished.items() if name not in announced or name in failed
        }
        self._write_changes(self.unfinished)

    def _write_changes(self, entries: Mapping[str, Entry], aliases: tuple[str, ...] = ()) -> None:
        # An unfinished change may be of a run that this writer held before. The number of a term is one of one run.
        runs = {(entry.record.run, entry.record.label) for entry in entries.values()}
        term = self.term.number if self.term is not None and runs <= {(self.term.run, self.term.label)} else 0
        changes = Changes(owner=self.owner, entries=tuple(entries.values()), aliases=aliases, term=term)
        if changes.names:
            write_changes(self.storage, changes, self.trust)
        else:
            with contextlib.suppress(OSError):  # The names are changed already, so another process finds that out.
                clear_changes(self.storage, self.owner)

    def has_stopped(self, owner: str, *, force: bool = False) -> bool:
        """Return whether another writer of the run has certainly ended; with ``force`` also if that is not known."""
        if is_dead(owner) or (force and not is_live(owner)):
            return True
        return self.term is not None and self.term.has_outlasted(owner)

    def check_term(self) -> None:
        """Raise `FencedError` if another process has taken over the run."""
        if self.term is not None:
            self.term.check()

    def delete(self, name: str) -> None:
        """Delete a record file; does nothing if it does not exist."""
        self.storage.delete(record_path(name))

    def _encode(self, entry: Entry) -> bytes:
        return to_json(signed(entry.to_dict(), self.trust))


@contextlib.contextmanager
def holding(journal: Journal, run: str, label: str, lease: Lease | None = None) -> Iterator[None]:
    """Hold a run while a command changes it; without a ``lease`` only if no process may be training it.

    Raises:
        RunInUseError: If a process trains the run.
    """
    lease = lease or Lease(waits=False)
    journal.term = claim_term(journal.storage, run, label, journal.owner, lease, journal.trust, is_new=False)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            journal.term.release()
        journal.term = None


@contextlib.contextmanager
def aborting(upload: Upload) -> Iterator[Upload]:
    """Remove what an upload has staged and not published, when the block ends."""
    try:
        yield upload
    finally:
        upload.abort()
