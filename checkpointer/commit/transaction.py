"""How a checkpoint is committed, named, retired and swept, so that a kill at any instant loses nothing.

The crash argument. A save goes through these steps, each durable before the next begins:

1. *Stage*: the payload streams to an invisible place beside its target, and is digested on the way.
2. *Sync*: the staged bytes are made durable.
3. *Announce*: a ``pending`` record with the payload's name, size and digest is written.
4. *Publish*: the payload appears under its name in one step.
5. *Commit*: the record becomes ``committed``. From here on the checkpoint is acknowledged.
6. *Alias*: ``last`` and ``best`` swing over in one step each.
7. *Retire* what nothing keeps: the record becomes ``retired`` first, then the payload goes, then the record.
8. *Tell* the listeners (the manager does).

Dead during 1 or 2: only an invisible file is left, which `sweep` removes once its writer is provably dead.
Dead after 3 or 4: the ``pending`` record says by digest whether the payload under the name is the new one (then it
is whole, and counts as committed), the one it was to replace (then that one's record, which the pending record
carries along, still holds), or a stranger's (then nothing of ours is there). Old or new, never neither.
Dead after 5: the checkpoint counts; aliases and retirement are worked out from the records again at the next save.
Dead within 7: a ``retired`` record is no checkpoint any more, and still names its payload so that it can be swept.
Nothing is ever deleted or replaced but what a record of our own, or a staging folder of a dead writer, names.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal

import attrs

from checkpointer.clock import SystemClock
from checkpointer.commit.index import HOME, Listing, json_name, read_bounded, read_entry, record_path
from checkpointer.commit.signing import HMACKey, check_signature, signed
from checkpointer.errors import (
    AliasInUseError,
    CheckpointerWarning,
    CorruptError,
    NameTakenError,
    RecordError,
    SaveError,
)
from checkpointer.ports import (
    Clock,
    Storage,
    SupportsCopy,
    SupportsLinks,
    SupportsPaths,
    SupportsSweep,
    Upload,
    Writable,
)
from checkpointer.records.codec import parse_json, to_json
from checkpointer.records.names import check_name
from checkpointer.records.record import SCHEMA, Entry, Record
from checkpointer.storage.digests import (
    ALGORITHM,
    CRYPTOGRAPHIC,
    DigestWriter,
    FolderDigest,
    algorithm_of,
    digest_of,
    size_of,
)
from checkpointer.storage.owner import is_dead, is_live
from checkpointer.storage.progress import Transfer

__all__ = ["Recovered", "Transaction", "marker_path"]

_CHUNK = 4 << 20


@attrs.frozen(kw_only=True)
class Recovered:
    """What the record files of a directory stand for."""

    records: tuple[Record, ...]
    """The checkpoints: committed, and their payload has the size that they say."""
    missing: tuple[Record, ...]
    """Committed records whose payload is gone, or has another size."""
    left: tuple[Entry, ...]
    """What is half-way."""


@attrs.define
class Transaction:
    """The steps above, on one storage, for one writer."""

    storage: Storage
    owner: str
    trust: HMACKey | None = None
    """Signs each record and alias marker that is written; what it has not signed is not believed."""
    clock: Clock = attrs.field(factory=SystemClock)
    """Tells when a payload takes long."""
    unfinished: dict[str, Record] = attrs.field(factory=dict, init=False)
    """Retired checkpoints whose payload could not be deleted yet."""

    @property
    def _algorithm(self) -> str:
        return ALGORITHM if self.trust is None else CRYPTOGRAPHIC

    # Commit

    def commit(
        self,
        draft: Record,
        write: Callable[[Writable], None],
        *,
        replaces: Record | None,
        over_alias: bool = False,
        expected: int | None = None,
    ) -> Record:
        """Write a payload and its record (steps 1 to 5); return the record with size and digest.

        ``replaces`` is the checkpoint of that name, if there is one; ``over_alias`` allows to write over an alias;
        ``expected`` is about how many bytes there will be, for the log.
        """
        upload = self.storage.upload(draft.name)
        try:
            stream = DigestWriter(Transfer(upload, draft.name, self.clock, expected=expected), self._algorithm)
            _write_all(write, stream)  # 1
            upload.finish()  # 2
            record = attrs.evolve(draft, size=stream.size, digest=stream.digest)
            return self._publish(upload, record, replaces, over_alias)
        finally:
            upload.abort()

    def commit_path(
        self,
        draft: Record,
        write: Callable[[str], None],
        *,
        replaces: Record | None,
        over_alias: bool,
        own_name: Callable[[], str],
    ) -> Record:
        """Let a trainer write to a staged path, then commit what it wrote; a folder is fine.

        No filesystem replaces a folder in one step: one that would have to is published under ``own_name`` instead.
        """
        assert isinstance(self.storage, SupportsPaths), "the manager has asked"
        path, upload = self.storage.stage(draft.name)
        try:
            write(path)  # 1
            if os.path.isdir(path) and (over_alias or (replaces is not None and self.storage.list(draft.name))):
                draft, replaces, over_alias, written = attrs.evolve(draft, name=own_name()), None, False, path
                path, upload = self.storage.stage(draft.name)
                os.rename(written, path)
            upload.finish()  # 2
            size, digest = self._digest_staged(path, self._algorithm)
            return self._publish(upload, attrs.evolve(draft, size=size, digest=digest), replaces, over_alias)
        finally:
            upload.abort()

    def commit_named(self, draft: Record, write: Callable[[], None]) -> Record:
        """Let a trainer write a file or folder to its final name, which nobody has, where nothing can be staged.

        A record announces the name, so that of two writers only one goes on; it is committed when all is there. Dead
        in between, no payload is what the record says: it counts for nothing, and what was written is not touched.
        """
        # Until it is committed, whatever is there is not what the record says: no bytes have this digest.
        zeros = "0" * len(FolderDigest(self._algorithm).digest.partition(":")[2])
        draft = attrs.evolve(draft, size=0, digest=f"{self._algorithm}:{zeros}")
        self._really_there(draft, None, over_alias=False)
        self._announce(Entry(record=draft, status="pending", owner=self.owner), is_new=True)  # 3
        try:
            write()  # 1, 2, 4
            size, digest = _measure(self.storage, draft.name, self._algorithm)
        except Exception:
            self.storage.delete(draft.name)
            self.storage.delete(record_path(draft.name))
            raise
        record = attrs.evolve(draft, size=size, digest=digest)
        self.put(Entry(record=record))  # 5
        return record

    def copy_in(self, record: Record, source: Storage, path: str, *, replaces: Record | None = None) -> Record:
        """Commit a copy of what lies at ``path`` of another storage (steps 1 to 5), if it is what ``record`` says.

        Raises:
            CorruptError: If there are other bytes, or none; nothing is published.
        """
        files = source.list(path)
        if files and set(files) != {path}:
            if isinstance(self.storage, SupportsPaths):
                return self._stage_folder(record, source, path, replaces)
            return self._upload_folder(record, source, path, replaces)
        upload = self.storage.upload(record.name)
        try:
            transfer = Transfer(upload, record.name, self.clock, expected=record.size, is_copy=True)
            stream = DigestWriter(transfer, algorithm_of(record.digest))
            for chunk in _read_chunks(source, path):  # 1
                stream.write(chunk)
            _check_copied(record, (stream.size, stream.digest), f"{path} in {source}")
            upload.finish()  # 2
            return self._publish(upload, record, replaces, over_alias=False)
        finally:
            upload.abort()

    def _stage_folder(self, record: Record, source: Storage, path: str, replaces: Record | None) -> Record:
        assert isinstance(self.storage, SupportsPaths), "it was asked"
        staged, upload = self.storage.stage(record.name)
        try:
            for inside in sorted(_inside(path, source)):  # 1
                target = os.path.join(staged, *inside.split("/"))
                os.makedirs(os.path.dirname(target), exist_ok=True)
                with open(target, "xb") as stream:
                    for chunk in _read_chunks(source, f"{path}/{inside}"):
                        stream.write(chunk)
            upload.finish()  # 2
            _check_copied(record, self._digest_staged(staged, algorithm_of(record.digest)), f"{path} in {source}")
            return self._publish(upload, record, replaces, over_alias=False)
        finally:
            upload.abort()

    def _upload_folder(self, record: Record, source: Storage, path: str, replaces: Record | None) -> Record:
        """Copy a folder to where there are only files: they appear one by one, and count when the record says so."""
        self._really_there(record, replaces, over_alias=False)
        pending = Entry(record=record, status="pending", previous=replaces, owner=self.owner)
        self._announce(pending, is_new=replaces is None)  # 3
        digest = FolderDigest(algorithm_of(record.digest))
        published: list[str] = []
        try:
            for inside, size in sorted(_inside(path, source).items()):
                digest.begin(inside, size)
                name = f"{record.name}/{inside}"
                self._upload_file(name, source, f"{path}/{inside}", digest)
                published.append(name)
            _check_copied(record, (digest.size, digest.digest), f"{path} in {source}")
        except Exception:
            for name in published:
                self.storage.delete(name)
            if replaces is None:
                self.storage.delete(record_path(record.name))
            else:
                self.put(Entry(record=replaces))
            raise
        self.put(Entry(record=record))  # 5
        return record

    def _upload_file(self, name: str, source: Storage, path: str, digest: FolderDigest) -> None:
        upload = self.storage.upload(name)
        try:
            for chunk in _read_chunks(source, path):  # 1
                digest.update(chunk)
                upload.write(chunk)
            upload.finish()  # 2
            upload.publish(replace=False)  # 4
        finally:
            upload.abort()

    def adopt(self, draft: Record, *, replaces: Record | None = None) -> Record:
        """Commit a payload that a trainer wrote under its final name already (steps 2 and 5).

        ``replaces`` is the record that the payload has already, if any.
        """
        if isinstance(self.storage, SupportsPaths):
            self.storage.sync(draft.name)
        size, digest = _measure(self.storage, draft.name, self._algorithm)
        record = attrs.evolve(draft, size=size, digest=digest)
        self._really_there(record, replaces, over_alias=False)
        self.put(Entry(record=record))
        return record

    def _digest_staged(self, path: str, algorithm: str) -> tuple[int, str]:
        from checkpointer.storage.local import LocalStorage

        parent, _, name = path.rpartition("/")
        return _measure(LocalStorage(parent, self.owner), name, algorithm)

    def _publish(self, upload: Upload, record: Record, replaces: Record | None, over_alias: bool) -> Record:
        replaces = self._really_there(record, replaces, over_alias)
        pending = Entry(record=record, status="pending", previous=replaces, owner=self.owner)
        self._announce(pending, is_new=replaces is None and not over_alias)  # 3
        try:
            upload.publish(replace=over_alias or replaces is not None)  # 4
        except OSError:
            # By now it may be the record of somebody who did not know of ours.
            if not self._is_announced(pending) or self.settle(pending, write=True) != record:
                raise
            if isinstance(self.storage, SupportsPaths):
                # It is there; whether it would survive a power loss is another question.
                self.storage.sync(record.name)
            return record
        try:
            self.put(Entry(record=record))  # 5
        except OSError as error:
            if replaces is None and not over_alias:
                self._remove(record)
                raise
            # The old payload is gone, and the pending record proves the new one: that is the state there is.
            msg = f"{record.name} was replaced, but its record could not be marked as committed ({error})"
            warnings.warn(msg, CheckpointerWarning, stacklevel=2)
        return record

    def _announce(self, pending: Entry, *, is_new: bool) -> None:
        """Write a pending record; that of a new name is created, so that of two writers only one goes on."""
        name = pending.record.name
        if not is_new:
            self.put(pending)
            return
        upload = self.storage.upload(record_path(name))
        try:
            upload.write(self._signed(pending))
            upload.finish()
            upload.publish(replace=False)
        except FileExistsError as error:
            msg = f"{name} is being written by another manager; nothing was replaced"
            raise NameTakenError(msg) from error
        finally:
            upload.abort()

    def _is_announced(self, pending: Entry) -> bool:
        try:
            entry = self._entry(pending.record.name)
        except RecordError:
            return False
        return entry is not None and entry.record.token == pending.record.token

    def _really_there(self, record: Record, replaces: Record | None, over_alias: bool) -> Record | None:
        """Return the checkpoint of this name as the storage has it; raise unless it is ours to replace."""
        entry = self._entry(record.name)
        if entry is None or entry.status == "retired":
            return replaces
        there: Record | None = entry.record
        # Of a writer on another host nobody knows whether it lives: a new name is left to it.
        replacing = replaces is not None or over_alias
        is_over = entry.owner == self.owner or (not is_live(entry.owner) if replacing else is_dead(entry.owner))
        if entry.status == "pending" and is_over:
            # An interrupted replacement: what is announced now must carry along what the payload really is.
            there = self.settle(entry, write=True)
        ours = there is None or (there.run, there.label) == (record.run, record.label)
        # Without a version counter it may be another run's: the very one that was decided on, and no later one.
        ours = ours or (replaces is not None and there is not None and there.token == replaces.token)
        # A slot of our own may be on record although its save failed: the disk broke when it was as good as committed.
        if there is not None and not (ours and replacing):
            msg = f"{record.name} is the name of a checkpoint that another manager has written; nothing was replaced"
            raise NameTakenError(msg)
        return there

    def has_record(self, name: str) -> bool:
        """Return whether a record of this name is there, readable or not; a listing might not show it yet."""
        try:
            return self._entry(name) is not None
        except RecordError:
            return True

    def committed(self, name: str) -> Record | None:
        """Return the committed checkpoint of this name; a listing might not show it yet."""
        with contextlib.suppress(RecordError):
            entry = self._entry(name)
            return entry.record if entry is not None and entry.status == "committed" else None
        return None

    def _entry(self, name: str) -> Entry | None:
        try:
            return read_entry(self.storage, record_path(name), self.trust)
        except FileNotFoundError:
            return None

    def put(self, entry: Entry) -> None:
        """Write a record file in one step, signed if there is a key."""
        self.storage.write(record_path(entry.record.name), self._signed(entry))

    def _signed(self, entry: Entry) -> bytes:
        return to_json(signed(entry.to_dict(), self.trust))

    # Recover

    def recover(self, listing: Listing, *, write: bool) -> Recovered:
        """Find out which checkpoints there are.

        With ``write``, what writers that are provably dead left half-way is finished, and not returned.
        """
        records: list[Record] = []
        left: list[Entry] = []
        for listed in listing.entries.values():
            is_left = listed.status != "committed" and write and is_dead(listed.owner)
            entry = self.refreshed(listed) if is_left else listed
            if entry is None:
                continue
            if entry.status == "committed":
                records.append(entry.record)
                continue
            finish = write and is_dead(entry.owner)
            records.extend(self.finish(entry, write=finish))
            left.extend([] if finish else [entry])
        records, missing = self._with_payload(self._without_moved(records, write=write), listing.sizes)
        return Recovered(records=tuple(records), missing=tuple(missing), left=tuple(left))

    def _with_payload(self, listed: Iterable[Record], sizes: Mapping[str, int]) -> tuple[list[Record], list[Record]]:
        """Return the records whose payload has the size that they say, and those whose payload has not."""
        there: list[Record] = []
        missing: list[Record] = []
        for record in listed:
            if sizes.get(record.name) == record.size or self.has_payload(record):
                there.append(record)
                continue
            # A live writer may have replaced or retired it since the listing.
            entry = self.refreshed(Entry(record=record))
            if entry is not None:
                now = [entry.record] if entry.status == "committed" else self.finish(entry, write=False)
                for found in now:
                    (there if self.has_payload(found) else missing).append(found)
        return there, missing

    def has_payload(self, record: Record) -> bool:
        """Return whether there is a payload of the size that the record says; nothing is read."""
        return size_of(self.storage, record.name, record.size) == record.size

    def refreshed(self, entry: Entry) -> Entry | None:
        """Return an entry as its record is now, None if there is none that can be read: others go on meanwhile."""
        try:
            return self._entry(entry.record.name)
        except RecordError:
            return None

    def finish(self, entry: Entry, *, write: bool) -> list[Record]:
        """Bring an entry that was left half-way to its end; return the committed record it stands for, if any.

        To ``write``, it has to be `refreshed`.
        """
        if entry.status == "pending":
            settled = self.settle(entry, write=write)
            return [settled] if settled else []
        if write and self._payload_is(entry.record):
            self._remove(entry.record)
        elif write:
            self.storage.delete(record_path(entry.record.name))
        return []

    def settle(self, entry: Entry, *, write: bool) -> Record | None:
        """Find out by digest what a ``pending`` record left, and with ``write`` make the record say so."""
        truth = entry.record if self._payload_is(entry.record) else entry.previous
        if write and truth is not None:
            self.put(Entry(record=truth))
        elif write:
            self.storage.delete(record_path(entry.record.name))
        return truth

    def _payload_is(self, record: Record) -> bool:
        if not self.has_payload(record):
            return False
        return digest_of(self.storage, record.name, algorithm_of(record.digest)) == (record.size, record.digest)

    # Retire and sweep

    def retire(self, records: Iterable[Record]) -> list[Record]:
        """Remove checkpoints (step 7) and return those that are no longer listed; failures warn and are retried."""
        retired = []
        for record in (*self.unfinished.values(), *records):
            try:
                self.put(Entry(record=record, status="retired", owner=self.owner))
            except OSError as error:
                self._warn("retired", record, error)
                continue
            retired.append(record)
            self.unfinished[record.name] = record
            try:
                self._remove(record)
            except OSError as error:
                self._warn("deleted", record, error)
        return retired

    def _remove(self, record: Record) -> None:
        # Of another size, it is not what we wrote: somebody put a file of their own there.
        if self.has_payload(record):
            self.storage.delete(record.name)
        self.storage.delete(record_path(record.name))
        self.unfinished.pop(record.name, None)

    def _warn(self, what: str, record: Record, error: OSError) -> None:
        msg = f"{record.name} could not be {what} ({error}); it is tried again at the next save"
        warnings.warn(msg, CheckpointerWarning, stacklevel=2)

    def sweep(self) -> int:
        """Remove what dead writers left unfinished, and return how much."""
        return self.storage.sweep() if isinstance(self.storage, SupportsSweep) else 0

    # Aliases

    def claim(self, alias: str, label: str) -> None:
        """Say that this manager keeps ``alias``; raise `AliasInUseError` if another live one does."""
        other = self._marker(alias).get("owner", "")
        if other != self.owner and is_live(other):
            pid = other.split("~")[1]
            msg = (
                f"the alias {alias!r} in {self.storage} is kept by another live manager (process {pid}); "
                "close that one, or give this one another label and alias: label='b', Naming(last='last-b')"
            )
            raise AliasInUseError(msg)
        self._mark(alias, label)

    def release(self, aliases: Iterable[str]) -> None:
        """Give the aliases free; the links themselves stay."""
        for alias in aliases:
            marker = self._marker(alias)
            if marker.get("owner") == self.owner:
                self._mark(alias, marker.get("label", ""), owner="")

    def is_marked(self, alias: str) -> bool:
        """Return whether this library made the alias."""
        return bool(self._marker(alias))

    def _mark(self, alias: str, label: str, owner: str | None = None) -> None:
        marker = {"schema": SCHEMA, "alias": alias, "label": label, "owner": self.owner if owner is None else owner}
        self.storage.write(marker_path(alias), json.dumps(signed(marker, self.trust)).encode())

    def _marker(self, alias: str) -> dict[str, str]:
        path = marker_path(alias)
        try:
            data = parse_json(read_bounded(self.storage, path), path)
            check_signature(data, path, self.trust)
        except (FileNotFoundError, RecordError):
            return {}
        return {k: v for k, v in data.items() if isinstance(v, str)} if isinstance(data, dict) else {}

    def alias(self, alias: str, how: Literal["link", "copy"], target: Record, *, slot: Record | None) -> None:
        """Make ``alias`` name the target's payload (step 6). ``slot``: a checkpoint under that very name, now gone."""
        if slot is not None:
            # Newer state is committed by now. Until the alias is made, the record says whose the payload under it is.
            self.put(Entry(record=slot, status="retired", owner=self.owner))
        self._make(alias, target.name, self._ways(how))
        if slot is not None:
            self.storage.delete(record_path(slot.name))

    def _make(self, path: str, target: str, ways: Iterable[Callable[[str, str], None]]) -> None:
        for make in ways:
            try:
                make(target, path)
            except (OSError, NotImplementedError):
                continue
            return
        self._copy(target, path)

    def _ways(self, how: Literal["link", "copy"]) -> Iterable[Callable[[str, str], None]]:
        if isinstance(self.storage, SupportsLinks):
            if how == "link":
                yield self.storage.symlink
            yield self.storage.hardlink
        if isinstance(self.storage, SupportsCopy):
            yield self.storage.copy
        if isinstance(self.storage, SupportsLinks):
            yield self.storage.symlink  # A folder has no hard links.

    def relocate(self, record: Record, name: str) -> Record:
        """Give a checkpoint another name, so that its old one is free; dead in between, both names hold it."""
        moved = attrs.evolve(record, name=name)
        self._announce(Entry(record=moved, status="pending", owner=self.owner), is_new=True)
        # Never a symbolic link: the old name is about to hold something else.
        ways = [way for way in self._ways("copy") if way.__name__ != "symlink"]
        try:
            self._make(name, record.name, ways)
        except FileNotFoundError:
            self.storage.delete(record_path(name))
            raise
        self.put(Entry(record=moved))
        self.storage.delete(record_path(record.name))
        return moved

    def move(self, record: Record, name: str) -> Record:
        """Rename a checkpoint on a disk, where the trainer must have its name; dead in between, one name holds it.

        For an instant both records are there, with one token between them: `recover` believes the one whose payload is.
        """
        assert isinstance(self.storage, SupportsPaths), "the directory has asked"
        moved = attrs.evolve(record, name=name)
        self._announce(Entry(record=moved, status="pending", owner=self.owner), is_new=True)
        os.rename(self.storage.local_path(record.name), self.storage.local_path(name))
        self.storage.sync(name)
        self.put(Entry(record=moved))
        self.storage.delete(record_path(record.name))
        return moved

    def _without_moved(self, records: list[Record], *, write: bool) -> list[Record]:
        """Leave out the old name of a checkpoint whose `move` was interrupted after the rename."""
        twice = {token for token, count in Counter(r.token for r in records).items() if count > 1}
        there = {r.token: r.name for r in records if r.token in twice and self.has_payload(r)}
        gone = [r for r in records if r.token in there and size_of(self.storage, r.name, r.size) is None]
        for record in gone if write else ():
            self.storage.delete(record_path(record.name))
        return [record for record in records if record not in gone]

    def _copy(self, source: str, path: str) -> None:
        """Copy bytes through this process, where the storage offers nothing better."""
        upload = self.storage.upload(path)
        try:
            with self.storage.open(source) as stream:
                while chunk := stream.read(_CHUNK):
                    upload.write(chunk)
            upload.finish()
            upload.publish(replace=True)
        finally:
            upload.abort()


def _write_all(write: Callable[[Writable], None], stream: DigestWriter) -> None:
    """Write, and let the disk's own error be seen: torch turns it, and even Ctrl-C, into one about file positions."""
    try:
        write(stream)
    except Exception:
        if stream.error is not None:
            raise stream.error from None
        raise


def _read_chunks(storage: Storage, path: str) -> Iterator[bytes]:
    """Yield a file's bytes; one that is gone is a `CorruptError`, for somebody has a record of it."""
    try:
        stream = storage.open(path)
    except FileNotFoundError as error:
        msg = f"{path} in {storage} is gone, though its record is there"
        raise CorruptError(msg) from error
    with stream:
        while chunk := stream.read(_CHUNK):
            yield chunk


def _inside(path: str, storage: Storage) -> dict[str, int]:
    """Return the size of each file of a folder by its path inside it; a listing cannot lead out of it."""
    return {check_name(name[len(path) + 1 :]): stat.size for name, stat in storage.list(path).items()}


def _check_copied(record: Record, found: tuple[int, str] | None, where: str) -> None:
    if found != (record.size, record.digest):
        msg = f"{where} has other bytes than its record says; nothing was copied"
        raise CorruptError(msg)


def _measure(storage: Storage, path: str, algorithm: str) -> tuple[int, str]:
    """Return size and digest of what a trainer wrote; raise if a restore could not find the same again."""
    found = digest_of(storage, path, algorithm)
    if found is None:
        msg = f"there is nothing at {path!r}: the trainer wrote no checkpoint to the path it was given"
        raise SaveError(msg)
    if found[0] != size_of(storage, path, found[0]):
        msg = f"{path!r} holds symbolic links, or changed while it was read; write plain files, and finish first"
        raise SaveError(msg)
    return found


def marker_path(alias: str) -> str:
    """Return where the mark lies that says whose an alias is."""
    return f"{HOME}/aliases/{json_name(alias)}"
