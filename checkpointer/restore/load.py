"""Verifies and loads one checkpoint; see `checkpointer.restore.fallback` for what happens if it is damaged."""

from __future__ import annotations

import collections
import contextlib
import functools
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, BinaryIO, Literal

import attrs

from checkpointer._parallel import ahead
from checkpointer._secrets import Secrets
from checkpointer.commit.payload_names import address, location
from checkpointer.errors import CorruptError, RestoreError
from checkpointer.formats import format_of, layout_of
from checkpointer.formats.archive_reader import OtherLayoutError
from checkpointer.ports import (
    FolderFormat,
    Format,
    Storage,
    SupportsFileDigests,
    SupportsMapping,
    SupportsPaths,
    SupportsURLs,
)
from checkpointer.records.digest_algorithms import DIGESTS
from checkpointer.records.record import Record
from checkpointer.restore.damaged_tensors import damage_in
from checkpointer.restore.folders import difference, other_files
from checkpointer.storage.digests import (
    Blocks,
    FolderDigest,
    VerifiedReader,
    algorithm_of,
    algorithm_of_files,
    files_of,
    read_digest,
)
from checkpointer.storage.pieces import filled

Verify = Literal["full", "mine", "size"]
"""How a payload is compared with its record before it is loaded."""

_CHUNK = 4 << 20


class GoneError(CorruptError):
    """Raised if the payload does not exist at all."""


@attrs.frozen(kw_only=True)
class Restored:
    """A checkpoint that was verified and loaded."""

    record: Record
    """Its name, step, epoch, metrics and time."""
    state: Any
    """The state, as the ``state`` callable returned it."""

    @property
    def step(self) -> int:
        """Finished optimizer steps when the state was taken."""
        return self.record.step

    @property
    def epoch(self) -> int:
        """0-based index of the epoch that was in progress or had just ended when the state was taken."""
        return self.record.epoch

    @property
    def epochs(self) -> int:
        """Finished epochs when the state was taken: the index of the epoch to go on with."""
        return self.record.progress.epochs


def verify(storage: Storage, record: Record) -> None:
    """Compare a payload with its record; raise `CorruptError` with the difference."""
    check_size(storage, record)
    _verify_digest(storage, record)


def check_size(storage: Storage, record: Record) -> Mapping[str, int]:
    """Return the payload's files; raise before any byte is read if their size is not as recorded."""
    files = files_of(storage, record.name, record.size)
    if not files:
        msg = f"{record.name} is gone, though its record is there"
        raise GoneError(msg)
    size = sum(files.values())
    if problem := difference(record, files):
        raise CorruptError(problem)
    if size != record.size:
        msg = f"{record.name} has {size} bytes, and its record says {record.size}"
        raise CorruptError(msg)
    return files


def _verify_digest(storage: Storage, record: Record) -> None:
    found = read_digest(storage, record.name, algorithm_of(record.digest))
    compare(storage, record, None if found is None else (found.size, found.digest), found.files if found else {})


def compare(
    storage: Storage,
    record: Record,
    found: tuple[int, str] | None,
    files: Mapping[str, tuple[int, str]] = MappingProxyType({}),
) -> None:
    """Raise `CorruptError` unless a payload has this size (bytes) and digest; by ``files`` it names what differs."""
    if found != (record.size, record.digest):
        msg = f"{record.name} has other bytes than were written: its digest differs from its record's"
        damage = other_files(storage, record, files) or _damage(storage, record.name)
        raise CorruptError(f"{msg}; {damage}" if damage else msg)


def _damage(storage: Storage, name: str) -> str:
    """Return which part of a file is damaged, or nothing. It is read again, so a restore from elsewhere skips it."""
    if _is_remote(storage) or name not in storage.list(name):
        return ""
    with contextlib.suppress(OSError, CorruptError), storage.open(name) as stream:
        return damage_in(stream)
    return ""


def _is_remote(storage: Storage) -> bool:
    return isinstance(storage, SupportsURLs) and not isinstance(storage, SupportsPaths)


def load(
    storage: Storage,
    open_format: Callable[[Record], Format | FolderFormat],
    record: Record,
    *,
    weights_only: bool,
    map_location: Any,
    verify: Verify = "full",
    mmap: bool = False,
) -> Restored:
    """Verify and load one checkpoint. The loaded bytes are the verified ones, even if the file changes in between.

    A folder that a trainer wrote is verified, and then opened again by the code that reads it. The tensors of a mapped
    file are its pages: they are the verified ones as long as no program writes into the file. What is unpickled is
    always verified.
    """
    payload = open_format(record)
    options = {"weights_only": weights_only, "map_location": map_location}
    is_folder = set(check_size(storage, record)) != {record.name}
    if is_folder:
        read_folder: Callable[..., Any] | None = payload.read_folder if isinstance(payload, FolderFormat) else None
        if verify != "size" and isinstance(payload, SupportsFileDigests):
            read_folder = functools.partial(
                payload.read_verified,
                files=dict(record.files) or _verified_files(storage, record),
                algorithm=algorithm_of_files(record.digest),
                everything=bool(record.files) and verify == "full",
            )
        elif verify != "size":
            _verify_digest(storage, record)
        return Restored(record=record, state=_read_folder(storage, record, read_folder, options))
    if isinstance(payload, FolderFormat):
        msg = f"{record.name} is a file, and the format {payload.name!r} reads folders"
        raise RestoreError(msg)
    with storage.open(record.name) as stream:
        payload = format_of(stream, payload)
        is_mapped = mmap and isinstance(storage, SupportsPaths) and isinstance(payload, SupportsMapping)
        try:
            state = _read_once(storage, record, stream, payload, options, is_mapped=is_mapped, verify=verify)
        except OtherLayoutError:
            read = _read_mapped if is_mapped else _read_twice
            state = read(storage, record, stream, payload, options, verify=verify)
    return Restored(record=record, state=state)


def _verified_files(storage: Storage, record: Record) -> dict[str, tuple[int, str]]:
    """Verify a folder whose record does not name its files; return size (bytes) and digest of each."""
    digest, files = FolderDigest(algorithm_of(record.digest)), {}
    for name, size in sorted(check_size(storage, record).items()):
        inside = name[len(record.name) + 1 :]
        digest.begin(inside, size)
        own = DIGESTS[digest.algorithm]()
        with storage.open(name) as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
                own.update(chunk)
        files[inside] = size, own.hexdigest()
    compare(storage, record, (digest.size, digest.digest))
    return files


def _read_once(
    storage: Storage,
    record: Record,
    stream: BinaryIO,
    payload: Format,
    options: Mapping[str, Any],
    *,
    is_mapped: bool,
    verify: Verify,
) -> Any:
    """Read each byte into its final place, or map it, and digest it there. Nothing is unpickled before that."""
    layout = layout_of(stream, payload, is_mapped=is_mapped)
    if layout is None:
        raise OtherLayoutError
    pieces = layout.pieces
    steps = ahead(layout.populate, len(pieces)) if is_mapped else filled(storage, record.name, stream, pieces)
    if verify != "size":
        digest = FolderDigest(algorithm_of(record.digest))
        done = 0
        for count in steps:
            for _, view in pieces[done:count]:
                digest.update(view)
            done = count
        compare(storage, record, (digest.size, digest.digest))
    elif not is_mapped:
        collections.deque(steps, maxlen=0)
    try:
        return layout.state(**options)
    except OtherLayoutError:
        stream.seek(0)
        raise


def _read_mapped(
    storage: Storage, record: Record, stream: BinaryIO, payload: Format, options: Mapping[str, Any], *, verify: Verify
) -> Any:
    if verify != "size":
        _verify_digest(storage, record)
    assert isinstance(payload, SupportsMapping)
    return payload.read_mapped(location(storage, record.name), **options)


def _read_twice(
    storage: Storage, record: Record, stream: BinaryIO, payload: Format, options: Mapping[str, Any], *, verify: Verify
) -> Any:
    if verify == "size":
        return payload.read(stream, **options)
    with _nearby(stream, storage, record) as near:
        digest = FolderDigest(algorithm_of(record.digest))
        verified = VerifiedReader(near, Blocks(near, digest))
        compare(storage, record, (digest.size, digest.digest))
        try:
            buffered: Any = io.BufferedReader(verified)
            return payload.read(buffered, **options)
        finally:
            if verified.error is not None:
                msg = f"{record.name} has other bytes than were written: {verified.error}"
                raise CorruptError(msg)


def _read_folder(storage: Storage, record: Record, read: Callable[..., Any] | None, options: Mapping[str, Any]) -> Any:
    if read is not None and isinstance(storage, SupportsPaths | SupportsURLs):
        place = address(storage, record.name)
        try:
            with Secrets(place, {}).hidden():
                return read(place, **options)
        except CorruptError as error:
            text = str(error)
            raise CorruptError(text if text.startswith(record.name) else f"{record.name}: {text}") from error
    msg = f"{record.name} is a folder that a trainer wrote; load it with the trainer's own reader"
    raise RestoreError(msg)


@contextlib.contextmanager
def _nearby(stream: BinaryIO, storage: Storage, record: Record) -> Iterator[BinaryIO]:
    """Copy a remote payload to this machine, because it is read twice; if there is no room, read it twice there."""
    if not _is_remote(storage) or shutil.disk_usage(tempfile.gettempdir()).free < 2 * record.size:
        yield stream
        return
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(stream, copy, _CHUNK)
        copy.seek(0)
        yield copy
