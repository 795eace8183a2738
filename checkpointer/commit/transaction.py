"""Commits a checkpoint in steps, so that a crash at any instant loses no checkpoint.

The crash argument. A save takes these steps. Each step is durable before the next one begins:

1. *Stage*: the payload is written to a hidden staging path, and its digest is computed on the way.
2. *Sync*: the staged bytes are made durable.
3. *Announce*: a ``pending`` entry with the payload's name, size and digest is written. If the name is new, it is the
   record of that name; if the name exists, it is in this writer's file of changes.
4. *Publish*: the payload appears under its name in one step.
5. *Commit*: the record becomes ``committed``. From here on the checkpoint counts.
6. *Announce again*: the aliases, and each checkpoint that no rule keeps, are written into the file of changes.
7. *Alias*: ``last`` and ``best`` are replaced in one step each.
8. *Retire*: of each checkpoint that no rule keeps, the payload is deleted, then the record.
9. *Report*: the manager empties the file of changes, and calls the listeners.

A crash in step 1 or 2 leaves a staged file. The storage's sweep removes it once its writer has certainly ended. That
cannot be known of a writer on another host. So on a disk, the process that takes over a run removes what the writer
before it has staged. This harms nothing if that writer goes on. The removal and step 4 take effect in one step each.
If step 4 comes first, the file has left the staging folder. If the removal comes first, step 4 fails: the writer looks
for the claim of the next term, which exists, and raises `FencedError`. A trainer may make a removed folder again, and
write the rest of it. So the writer also looks for that claim when a trainer has written. Thus nothing that was
acknowledged is lost. Nor has the writer staged anything for another run: it releases its term before it claims one of
another run, and no process takes over from a term that was released.

On S3 a payload of several parts is staged as an upload, which step 4 completes. Before the writer sends a part, it
notes the upload's id under its own name. The process that takes over aborts the uploads with these ids. For the server
it is one step to complete an upload, and one to abort it, so the same argument holds. If step 4 fails, the writer looks
whether the object has the token of this upload, because a reply may be lost. Else the payload under the name decides,
as after a crash. Other servers rename or copy what is staged. If the reply to that is lost, a writer that finds its
file gone takes it for renamed. So nothing is removed there within a day.

Folders at a URL are not staged: `checkpointer.commit.killed_saves` has their steps, and argues when files are removed.

A crash after step 3 or 4 leaves a ``pending`` entry. The digest of the payload under its name decides:

- If it is the new payload, it is whole, and the new record counts.
- If it is the replaced payload, the previous record counts, which the pending entry contains.
- If it is another file, neither record counts, and the file stays as it is.

So the old or the new checkpoint is there.
A crash after step 5 leaves a checkpoint that counts. The next save computes aliases and retirement from the records.
A crash after step 6 leaves the file of changes. If a checkpoint that it names as ``retired`` has lost its payload, the
next process deletes its record. If the payload is whole, an alias may still lead to it, so the checkpoint counts again.
If the file names aliases only, it is not durable. After a power loss it may be empty, or hold zeros instead of text.
Then it announces nothing, because its writer has ended with the machine.
The manager deletes or replaces only payloads that its own records name, and staging folders of ended writers.
`checkpointer.commit.terms` argues that this also holds if another process takes over the run at any moment.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import attrs

from checkpointer._display import shard_text, some_of
from checkpointer.clock import SystemClock
from checkpointer.commit.journal import Journal, aborting
from checkpointer.commit.killed_saves import is_begun, no_digest, remove_files
from checkpointer.commit.recovery import remove, settle
from checkpointer.errors import CorruptError, NameTakenError, SaveError, warn
from checkpointer.ports import Clock, Storage, SupportsPaths, Upload, Writable
from checkpointer.records.codec import METADATA
from checkpointer.records.names import check_name
from checkpointer.records.record import Entry, Record
from checkpointer.storage.digests import (
    DigestWriter,
    FolderDigest,
    algorithm_of,
    digest_of,
    digest_of_files,
    size_of,
)
from checkpointer.storage.local import LocalStorage
from checkpointer.storage.owner import is_dead, is_live
from checkpointer.storage.progress import Transfer

_CHUNK = 4 << 20
_MAX_FILES: Final = 2000
"""A record has to stay small. If a folder has more files than this, its record names `METADATA` alone."""

Files = Mapping[str, tuple[int, str]]
"""Size (bytes) and digest (hex digits) of each file of a folder by its path inside."""
WritePath = Callable[[str], "Files | None"]
"""Writes a payload to a path or URL. Returns its files if it has digested them."""


@attrs.define
class Transaction:
    """Steps 1 to 5 of a save."""

    journal: Journal
    clock: Clock = attrs.field(factory=SystemClock)
    """Decides when a transfer is slow enough to be logged."""
    storage: Storage = attrs.field(init=False)
    transfer: Transfer | None = attrs.field(default=None, init=False)
    """The payload that is being written; other threads may read how far it is."""
    _failed: list[Record] = attrs.field(factory=list, init=False)
    """Saves under final names that have failed."""

    def __attrs_post_init__(self) -> None:
        self.storage = self.journal.storage

    def commit(
        self,
        draft: Record,
        write: Callable[[Writable], None],
        *,
        replaces: Record | None,
        over_alias: bool = False,
        expected: int | None = None,
    ) -> Record:
        """Write a payload and its record; return the record with size and digest.

        ``replaces`` is the checkpoint that has the name now. ``over_alias`` allows to replace an alias. ``expected`` is
        the estimated size (bytes), for the log.
        """
        with aborting(self.storage.upload(draft.name)) as upload:
            self.transfer = transfer = Transfer(draft.name, self.clock, expected=expected)
            stream = DigestWriter(upload, self.journal.algorithm, transfer.note)
            try:
                write(stream)  # 1
            except Exception:
                # torch replaces the disk's own error, and even Ctrl-C, by one about file positions.
                if stream.error is not None:
                    raise stream.error from None
                raise
            finally:
                self.transfer = None
            upload.finish()  # 2
            record = attrs.evolve(draft, size=stream.size, digest=stream.digest)
            return self._publish(upload, record, replaces, over_alias)

    def commit_path(
        self,
        draft: Record,
        write: WritePath,
        *,
        replaces: Record | None,
        over_alias: bool,
        own_name: Callable[[], str],
    ) -> Record:
        """Let a trainer write a file or folder to a staged path, then commit it.

        A filesystem cannot replace a folder in one step. If it would have to, the folder gets ``own_name`` instead.
        """
        assert isinstance(self.storage, SupportsPaths), "the saver checks it"
        path, upload = self.storage.stage(draft.name)
        try:
            files = write(path)  # 1
            self.journal.check_term()  # If the folder was removed meanwhile, a trainer may have made it again.
            if os.path.isdir(path) and (over_alias or (replaces is not None and self.storage.list(draft.name))):
                draft, replaces, over_alias, written = attrs.evolve(draft, name=own_name()), None, False, path
                path, upload = self.storage.stage(draft.name)
                os.rename(written, path)
            upload.finish()  # 2
            record = self._digested(draft, *self._staged(path), files)
            return self._publish(upload, record, replaces, over_alias)
        finally:
            upload.abort()

    def commit_named(self, draft: Record, write: Callable[[], Files | None]) -> Record:
        """Let a trainer write a file or folder to an unused final name, if the storage cannot stage it.

        A pending record reserves the name, so only one of two writers continues. After a crash the payload does not
        match the record, so it does not count. `checkpointer.commit.killed_saves` removes its files.

        Raises:
            FencedError: If another process has taken over the run meanwhile. It may have removed the files.
        """
        draft = attrs.evolve(draft, size=0, digest=no_digest(self.journal.algorithm))
        self.journal.announce(self.journal.pending(draft))  # 3
        try:
            files = write()  # 1, 2, 4
            record = self._digested(draft, self.storage, draft.name, files)
        except Exception:
            with contextlib.suppress(OSError), self.journal.changing(aliases=[draft.name]):
                remove_files(self.storage, draft)
                self._failed.append(draft)
            raise
        self._commit(record)  # 5
        self.journal.check_term()
        self._forget_failed()
        return record

    def _forget_failed(self) -> None:
        """Remove the records of saves that have failed. Their ranks have ended them, because they have saved again."""
        failed, self._failed = self._failed, []
        if failed:
            with contextlib.suppress(OSError), self.journal.changing(aliases=[draft.name for draft in failed]):
                for draft in failed:
                    remove_files(self.storage, draft)
                    self.journal.delete(draft.name)

    def _digested(self, draft: Record, storage: Storage, name: str, files: Files | None) -> Record:
        """Return the record of a payload that is written. It is read for its digest, unless its ``files`` are known."""
        if files is None:
            size, digest = _measure(storage, name, self.journal.algorithm)
            return attrs.evolve(draft, size=size, digest=digest)
        _check_written(storage, name, files)
        size, digest = digest_of_files(files, self.journal.algorithm)
        named = files if len(files) <= _MAX_FILES else {name: files[name] for name in files if name == METADATA}
        return attrs.evolve(draft, size=size, digest=digest, files=named)

    def adopt(self, draft: Record, *, replaces: Record | None = None) -> Record:
        """Commit a payload that a trainer has written under its final name (steps 2 and 5)."""
        if isinstance(self.storage, SupportsPaths):
            self.storage.sync(draft.name)
        size, digest = _measure(self.storage, draft.name, self.journal.algorithm)
        record = attrs.evolve(draft, size=size, digest=digest)
        replaced = self._check_replaced(record, replaces, over_alias=False)
        if replaced is None and self.journal.read(record.name) is None:
            self.journal.announce(Entry(record=record))
            return record
        with self.journal.changing(self.journal.pending(record, replaced)):
            return self._commit(record)

    def copy_in(self, record: Record, source: Storage, path: str, *, replaces: Record | None = None) -> Record:
        """Commit a copy of the payload at ``path`` of another storage, if it matches the record.

        Raises:
            CorruptError: If it does not match, or does not exist; nothing is published.
        """
        files = source.list(path)
        if files and set(files) != {path}:
            copy_folder = self._stage_folder if isinstance(self.storage, SupportsPaths) else self._upload_folder
            return copy_folder(record, source, path, replaces)
        with aborting(self.storage.upload(record.name)) as upload:
            transfer = Transfer(record.name, self.clock, expected=record.size, is_copy=True)
            stream = DigestWriter(upload, algorithm_of(record.digest), transfer.note)
            for chunk in _read_chunks(source, path):  # 1
                stream.write(chunk)
            _check_copied(record, (stream.size, stream.digest), f"{path} in {source}")
            upload.finish()  # 2
            return self._publish(upload, record, replaces, over_alias=False)

    def _stage_folder(self, record: Record, source: Storage, path: str, replaces: Record | None) -> Record:
        assert isinstance(self.storage, SupportsPaths), "copy_in checks it"
        staged, upload = self.storage.stage(record.name)
        with aborting(upload):
            for inside in sorted(_inside(path, source)):  # 1
                target = os.path.join(staged, *inside.split("/"))
                os.makedirs(os.path.dirname(target), exist_ok=True)
                with open(target, "xb") as stream:
                    for chunk in _read_chunks(source, f"{path}/{inside}"):
                        stream.write(chunk)
            upload.finish()  # 2
            _check_copied(record, _measure(*self._staged(staged), algorithm_of(record.digest)), f"{path} in {source}")
            return self._publish(upload, record, replaces, over_alias=False)

    def _upload_folder(self, record: Record, source: Storage, path: str, replaces: Record | None) -> Record:
        """Upload the files of a folder one by one. They count when the record is committed."""
        if replaces is None:
            self.journal.announce(self.journal.pending(record))  # 3
        else:
            self._check_replaced(record, replaces, over_alias=False)
        with self.journal.changing(*([self.journal.pending(record, replaces)] if replaces else [])):
            return self._upload_files(record, source, path, replaces)

    def _upload_files(self, record: Record, source: Storage, path: str, replaces: Record | None) -> Record:
        digest = FolderDigest(algorithm_of(record.digest))
        published: list[str] = []
        try:
            for inside, size in sorted(_inside(path, source).items()):
                digest.begin(inside, size)
                name = f"{record.name}/{inside}"
                with aborting(self.storage.upload(name)) as upload:
                    for chunk in _read_chunks(source, f"{path}/{inside}"):  # 1
                        digest.update(chunk)
                        upload.write(chunk)
                    upload.finish()  # 2
                    upload.publish(replace=False)  # 4
                published.append(name)
            _check_copied(record, (digest.size, digest.digest), f"{path} in {source}")
        except Exception:
            with self.journal.changing(aliases=[record.name]):
                for name in published:
                    self.storage.delete(name)
                if replaces is None:
                    self.journal.delete(record.name)
                else:
                    self._commit(replaces)
            raise
        return self._commit(record)  # 5

    def _publish(self, upload: Upload, record: Record, replaces: Record | None, over_alias: bool) -> Record:
        replaces = self._check_replaced(record, replaces, over_alias)
        is_new = replaces is None and not over_alias
        pending = self.journal.pending(record, replaces)
        if is_new:
            self.journal.announce(pending)  # 3
        with self.journal.changing(*([] if is_new else [pending])) as failed:  # 3
            try:
                upload.publish(replace=not is_new)  # 4
            except OSError:
                # Another writer may have replaced our record without reading it.
                entry, expected = self.journal.find(record.name), record if is_new else replaces
                is_ours = (entry.record.token if entry else "") == (expected.token if expected else "")
                if not is_ours or settle(self.journal, pending, write=True) != record:
                    raise
                if isinstance(self.storage, SupportsPaths):
                    # The payload is published, but may not be durable.
                    self.storage.sync(record.name)
                return record
            try:
                self.journal.put(Entry(record=record))  # 5
            except OSError as error:
                if is_new:
                    # Another process may have taken over, and count it.
                    with self.journal.changing(self.journal.retiring(record)):
                        remove(self.journal, record)
                    raise
                # The old payload is gone, and the announced change proves the new one.
                failed.add(record.name)
                msg = f"{record.name} was replaced, but its record could not be marked as committed ({error})"
                warn(msg)
        return record

    def _commit(self, record: Record) -> Record:
        self.journal.put(Entry(record=record))
        return record

    def _check_replaced(self, record: Record, replaces: Record | None, over_alias: bool) -> Record | None:
        """Return the checkpoint that has this name now; raise `NameTakenError` if this writer may not replace it."""
        self._settle_unfinished(record.name)
        entry = self.journal.read(record.name)
        if entry is None or entry.status == "retired":
            return replaces
        if entry.status == "pending" and is_begun(entry.record):
            msg = f"another save has begun to write {record.name}; nothing was replaced"
            raise NameTakenError(msg)
        there: Record | None = entry.record
        # A writer on another host may be alive, so its new name is not taken over.
        replacing = replaces is not None or over_alias
        is_dead_writer = not is_live(entry.owner) if replacing else is_dead(entry.owner)
        if entry.status == "pending" and (entry.owner == self.journal.owner or is_dead_writer):
            # A replacement was interrupted. The next pending record must contain the record that the payload proves.
            with self.journal.changing(aliases=[record.name]):
                there = settle(self.journal, entry, write=True)
        is_ours = there is None or (there.run, there.label) == (record.run, record.label)
        # Without a version counter it may be a checkpoint of another run: exactly the one that was decided on.
        is_ours = is_ours or (replaces is not None and there is not None and there.token == replaces.token)
        # The record of our own slot may exist although its save failed: the disk failed after the commit.
        if there is not None and not (is_ours and replacing):
            msg = f"another manager has written a checkpoint named {record.name}; nothing was replaced"
            raise NameTakenError(msg)
        return there

    def _settle_unfinished(self, name: str) -> None:
        """Finish an earlier replacement of this name that has failed: the payload shows whether it was done."""
        entry = self.journal.unfinished.get(name)
        if entry is not None and entry.status == "pending":
            with self.journal.changing(entry):
                settle(self.journal, entry, write=True)

    def _staged(self, path: str) -> tuple[Storage, str]:
        """Return the staging folder as a storage, and the name that a staged file has there."""
        parent, _, name = path.rpartition("/")
        return LocalStorage(parent, self.journal.owner), name


def _check_written(storage: Storage, name: str, files: Files) -> None:
    """Raise unless a folder has exactly the files that were written."""
    there = {path[len(name) + 1 :]: stat.size for path, stat in storage.list(name).items()}
    if there == {inside: size for inside, (size, _) in files.items()}:
        return
    if gone := sorted(files.keys() - there.keys()):
        what = f"{some_of([*map(shard_text, gone)])} cannot be seen by rank 0"
        msg = f"{what}, although it was written; all ranks have to use one directory, on a storage that they share"
        raise SaveError(msg)
    other = sorted(inside for inside, size in there.items() if files.get(inside, (-1, ""))[0] != size)
    msg = f"{some_of(other)} in {name!r} was written by another program, or was changed while the folder was written"
    raise SaveError(msg)


def _read_chunks(storage: Storage, path: str) -> Iterator[bytes]:
    try:
        stream = storage.open(path)
    except FileNotFoundError as error:
        msg = f"{path} in {storage} is gone, but its record exists"
        raise CorruptError(msg) from error
    with stream:
        while chunk := stream.read(_CHUNK):
            yield chunk


def _inside(path: str, storage: Storage) -> dict[str, int]:
    """Return the size (bytes) of each file of a folder by its path inside; check that no path leads outside."""
    return {check_name(name[len(path) + 1 :]): stat.size for name, stat in storage.list(path).items()}


def _check_copied(record: Record, found: tuple[int, str] | None, where: str) -> None:
    if found != (record.size, record.digest):
        msg = f"{where} has other bytes than its record says; it was not copied"
        raise CorruptError(msg)


def _measure(storage: Storage, path: str, algorithm: str) -> tuple[int, str]:
    """Return size (bytes) and digest of a payload that a trainer wrote; raise if a restore could not read the same."""
    found = digest_of(storage, path, algorithm)
    if found is None:
        msg = f"there is nothing at {path!r}: the trainer wrote no checkpoint to the path that it got"
        raise SaveError(msg)
    if found[0] != size_of(storage, path, found[0]):
        msg = f"{path!r} holds symbolic links, or changed while it was read; write plain files, and finish first"
        raise SaveError(msg)
    return found
