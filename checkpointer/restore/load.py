"""Restore: choose a checkpoint, verify it, load it, and fall back to the next newest valid one, saying why."""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, BinaryIO, Literal

import attrs

from checkpointer._display import some_of
from checkpointer.commit.index import HOME, RECORDS, directories_below, record_path
from checkpointer.errors import (
    CheckpointerWarning,
    CorruptError,
    NotFoundError,
    NoValidCheckpointError,
    RecordError,
    RestoreError,
    UntrustedError,
)
from checkpointer.formats import format_of
from checkpointer.policy.policy import Policy
from checkpointer.ports import FolderFormat, Format, Storage, SupportsMapping, SupportsPaths, SupportsURLs
from checkpointer.records.manifest import Manifest
from checkpointer.records.record import Record
from checkpointer.storage.digests import VerifiedReader, algorithm_of, digest_of, files_of

__all__ = ["Restored", "Verify", "check_empty", "choose", "holding_on_to", "load", "load_first_valid", "verify"]

Verify = Literal["full", "size"]
"""How a payload is held against its record before it is loaded."""

_CHUNK = 4 << 20
_FEW = 5
"""How many problems an error names."""


class _GoneError(CorruptError):
    """Raised for a payload that is not there at all."""


@attrs.frozen(kw_only=True)
class Restored:
    """A checkpoint that was verified and loaded."""

    record: Record
    """What is known about it: name, step, epoch, metrics, time."""
    state: Any
    """The state, as the ``state`` callable returned it."""

    @property
    def step(self) -> int:
        """Finished optimizer steps when the state was taken."""
        return self.record.step

    @property
    def epoch(self) -> int:
        """0-based index of the epoch in progress or just ended when the state was taken."""
        return self.record.epoch

    @property
    def epochs(self) -> int:
        """Finished epochs when the state was taken: the index of the epoch to go on with."""
        return self.record.progress.epochs


def choose(
    which: str | int | None,
    policy: Policy,
    manifest: Manifest,
    contents: Literal["full", "any"],
    *,
    damaged: Mapping[str, RecordError] = MappingProxyType({}),
) -> tuple[Record, ...]:
    """Return the records to try, in order. Only the newest and the best have others to fall back to.

    ``damaged`` are the record files that cannot be read or believed, by their paths.

    Raises:
        NotFoundError: If no record has that name or step.
        CorruptError: If the record of that name cannot be read.
        UntrustedError: If the record of that name is not signed with the manager's key.
        RestoreError: If the record named has only weights, and ``contents="full"``.
    """
    aliases = {policy.name.last_file: "last", policy.name.best_file: "best"}
    if isinstance(which, str) and which not in manifest.by_name:
        which = aliases.get(which, which)
    if which in (None, "last"):
        return tuple(r for r in reversed(manifest.live) if contents == "any" or r.contents == "full")
    if which == "best":
        return _best_first(policy, manifest, contents)
    record = _named(which, policy, manifest, damaged)
    if contents == "full" and record.contents == "weights":
        msg = f"{record.name} holds only weights and cannot resume a run; pass contents='any' to load them"
        raise RestoreError(msg)
    return (record,)


def _best_first(policy: Policy, manifest: Manifest, contents: Literal["full", "any"]) -> tuple[Record, ...]:
    if policy.ranking is None:
        msg = "there is no best: no rule of the policy ranks; add KeepBest(k, metric, mode=...) to keep"
        raise RestoreError(msg)
    return tuple(policy.best_first(r for r in manifest.history if contents == "any" or r.contents == "full"))


def _named(which: str | int | None, policy: Policy, manifest: Manifest, damaged: Mapping[str, RecordError]) -> Record:
    names = [] if which is None or isinstance(which, int) else [which, f"{which}{policy.name.suffix}"]
    if isinstance(which, int):
        # An abandoned checkpoint may be asked for by its step, if no other has that step.
        found = [r for r in manifest.own if r.step == which]
        found.sort(key=lambda r: (manifest.counts(r), r.kind == "regular", r.serial))
    else:
        found = [r for name in names if (r := manifest.by_name.get(name))][:1]
    if found:
        return found[-1]
    for refusal in [damaged[path] for name in names if (path := record_path(name)) in damaged]:
        raise (UntrustedError if isinstance(refusal, UntrustedError) else CorruptError)(str(refusal)) from refusal
    newest = ", ".join(f"{r.name} (step {r.step})" for r in manifest.records[-10:])
    have = f"the newest are: {newest}" if newest else "the directory has no checkpoint"
    refused = "".join(f"; {refusal}" for refusal in [*damaged.values()][:3])
    msg = f"no checkpoint {'at step ' if isinstance(which, int) else ''}{which!r}; {have}{refused}"
    raise NotFoundError(msg)


def verify(storage: Storage, record: Record) -> None:
    """Compare a payload with its record; raise `CorruptError` that says how they differ."""
    _listed(storage, record)
    _verify_digest(storage, record)


def _verify_digest(storage: Storage, record: Record) -> None:
    _compare(record, digest_of(storage, record.name, algorithm_of(record.digest)))


def _listed(storage: Storage, record: Record) -> Mapping[str, int]:
    """Return the payload's files, if they are there and as large as the record says: before anything is read."""
    files = files_of(storage, record.name, record.size)
    size = sum(files.values())
    if not files:
        msg = f"{record.name} is gone, though its record is there"
        raise _GoneError(msg)
    elif size != record.size:
        msg = f"{record.name} has {size} bytes where its record says {record.size}"
    else:
        return files
    raise CorruptError(msg)


def _compare(record: Record, found: tuple[int, str] | None) -> None:
    if found != (record.size, record.digest):
        msg = f"{record.name} has other bytes than were written: its digest differs from its record's"
        raise CorruptError(msg)


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
    """Verify and load one checkpoint: what is loaded is what was verified, whatever happens in between.

    A folder, and a file that is mapped, are verified first, and then opened again by the code that reads them.
    """
    payload = open_format(record)
    options = {"weights_only": weights_only, "map_location": map_location}
    if set(_listed(storage, record)) != {record.name}:
        if verify == "full":
            _verify_digest(storage, record)
        return Restored(record=record, state=_read_folder(storage, record, payload, options))
    if isinstance(payload, FolderFormat):
        msg = f"{record.name} is a file, and the format {payload.name!r} reads folders"
        raise RestoreError(msg)
    if mmap and isinstance(storage, SupportsPaths) and isinstance(payload, SupportsMapping):
        if verify == "full":
            _verify_digest(storage, record)
        with storage.open(record.name) as stream:
            payload = format_of(stream, payload)
        assert isinstance(payload, SupportsMapping)  # The formats that are exchanged both are.
        return Restored(record=record, state=payload.read_mapped(storage.local_path(record.name), **options))
    with storage.open(record.name) as remote:
        if verify == "size":
            return Restored(record=record, state=format_of(remote, payload).read(remote, **options))
        with _nearby(remote, storage, record) as near:
            verified = VerifiedReader(near, algorithm_of(record.digest))
            _compare(record, (verified.size, verified.digest))
            try:
                buffered: Any = io.BufferedReader(verified)
                return Restored(record=record, state=format_of(buffered, payload).read(buffered, **options))
            finally:
                if verified.error is not None:
                    msg = f"{record.name} has other bytes than were written: {verified.error}"
                    raise CorruptError(msg)


def _read_folder(storage: Storage, record: Record, payload: Format | FolderFormat, options: Mapping[str, Any]) -> Any:
    path = _address(storage, record.name)
    if isinstance(payload, FolderFormat) and path:
        return payload.read_folder(path, **options)
    msg = f"{record.name} is a folder that a trainer wrote; load it with the trainer's own reader"
    raise RestoreError(msg)


@contextlib.contextmanager
def _nearby(stream: BinaryIO, storage: Storage, record: Record) -> Iterator[BinaryIO]:
    """Bring what lies elsewhere here once, for it is read twice; where there is room for it."""
    if not isinstance(storage, SupportsURLs) or isinstance(storage, SupportsPaths):
        yield stream
        return
    if shutil.disk_usage(tempfile.gettempdir()).free < 2 * record.size:
        yield stream
        return
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(stream, copy, _CHUNK)
        copy.seek(0)
        yield copy


def _address(storage: Storage, name: str) -> str:
    """Return the path or URL by which others than the storage read a payload; empty if there is none."""
    if isinstance(storage, SupportsPaths):
        return storage.local_path(name)
    return storage.url(name) if isinstance(storage, SupportsURLs) else ""


@contextlib.contextmanager
def holding_on_to(record: Record, storage: Storage) -> Iterator[None]:
    """Let a storage elsewhere that does not answer end the restore: its checkpoint is not bad, only out of reach.

    Going on from an older one would abandon it. A file on this machine that cannot be read stays so.
    """
    try:
        yield
    except OSError as error:
        if isinstance(storage, SupportsPaths) or isinstance(error, FileNotFoundError):
            raise
        msg = (
            f"{record.name} in {storage} could not be read ({type(error).__name__}: {error}); nothing was restored, "
            "for going on from an older checkpoint would abandon it. Try again, or restore one by name or step"
        )
        raise RestoreError(msg) from error


def load_first_valid(
    records: Sequence[Record],
    load: Callable[[Record], Restored],
    on_bad: Callable[[Record], None],
    bad: Iterable[str] = (),
) -> Restored | None:
    """Load the first record whose payload is whole; None if there is nothing at all.

    Raises:
        NoValidCheckpointError: If there were candidates or damaged records, and none is valid.
        UnsafePayloadError: At once: an older checkpoint holds the same kind of objects.
    """
    problems = list(bad)
    all_gone = not problems
    for record in records:
        try:
            restored = load(record)
        except (CorruptError, OSError) as error:
            problems.append(str(error))
            all_gone = all_gone and isinstance(error, _GoneError)
            if isinstance(error, CorruptError):
                on_bad(record)
            continue
        if problems:
            instead = f"restored {record.name} (step {record.step}) instead of what is newer or better"
            msg = f"{instead}: {_few(problems)}"
            warnings.warn(msg, CheckpointerWarning, stacklevel=3)
        return restored
    if problems:
        way_out = "restore one by name, or use an empty directory"
        if all_gone:
            way_out = (
                f"put a payload back, or to begin anew remove the records in {RECORDS} too, or use another directory"
            )
        msg = f"no valid checkpoint: {_few(problems)}. Training does not start over silently: {way_out}"
        raise NoValidCheckpointError(msg)
    return None


def _few(problems: Sequence[str]) -> str:
    """Return the first few, and how many more there are."""
    more = f"; and {len(problems) - _FEW} more" if len(problems) > _FEW else ""
    return "; ".join(problems[:_FEW]) + more


def check_empty(which: object, policy: Policy, manifest: Manifest, storage: Storage | None) -> None:
    """Raise unless there is really nothing to restore, so that training does not start over silently.

    Without ``storage`` files that no record names count for nothing.
    """
    if manifest.live:
        msg = "there are only weights, which cannot resume a run; pass contents='any' to load them"
        raise RestoreError(msg)
    if which not in (None, "last", policy.name.last_file):
        msg = f"there is no {which!r}: no checkpoint of the run is ranked"
        raise NotFoundError(msg)
    if storage is None:
        return
    suffix, there = policy.name.suffix, storage.list()
    below = [] if manifest.records else directories_below(there, RECORDS)
    if below:
        msg = (
            f"{storage} has no checkpoint of its own, and these directories below have: {some_of(below)}. Training "
            "does not start over silently: name one of them, or use an empty directory"
        )
        raise NoValidCheckpointError(msg)
    files = sorted(path for path in there if path.endswith(suffix) and not path.startswith(f"{HOME}/"))
    if files and not manifest.records:
        msg = (
            f"{storage} has no record, but files such as {', '.join(files[:3])}. Training does not start over "
            "silently: load one of them yourself, or use an empty directory"
        )
        raise NoValidCheckpointError(msg)
