"""Verifies every checkpoint of a directory: sizes, digests and, looked into, that each tensor's bytes are there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, Literal

import attrs

from checkpointer.errors import CorruptError, RestoreError, reading
from checkpointer.formats.inspection.payload import open_contents
from checkpointer.formats.inspection.torch_file import bad_member
from checkpointer.ports import Storage
from checkpointer.records.record import Record
from checkpointer.restore.load import check_size, verify
from checkpointer.storage.progress import CountingStorage
from checkpointer.tools.catalog import Catalog

_LOOKS: Final = 3
"""So often the directory is read again, if checkpoints are replaced while they are read."""
_AT_ONCE: Final = 16
"""For so many checkpoints that are not sound the directory is read again at once; for the others at the end."""
Depth = Literal["sizes", "digests", "contents"]
"""Compare sizes with the listing, read every byte, or look into each payload as well."""


@attrs.frozen(kw_only=True)
class Finding:
    """The result for one checkpoint."""

    name: str
    problem: str = ""
    """The damage; empty if it is sound."""
    calls: tuple[str, ...] = ()
    """The functions that an ordinary unpickler would call; empty unless its contents were looked at."""
    by: str = ""
    """What it was compared with, if it has no record; empty if there was nothing to compare it with."""
    is_retired: bool = False
    """Whether a running process has retired it since the directory was read. That is not damage."""

    def __bool__(self) -> bool:
        """Return whether it is sound."""
        return not self.problem


def verify_one(storage: Storage, record: Record, depth: Depth = "digests") -> Finding:
    """Verify one checkpoint. Nothing is loaded, and nothing in it runs."""
    try:
        if depth == "sizes":
            check_size(storage, record)
        else:
            verify(storage, record)
        with reading(record.name):
            calls = _look_into(storage, record) if depth == "contents" else ()
    except (RestoreError, OSError) as error:
        return Finding(name=record.name, problem=str(error).removeprefix(record.name).removeprefix(":").lstrip())
    return Finding(name=record.name, calls=calls)


def verify_all(
    catalog: Catalog,
    records: Sequence[Record],
    depth: Depth = "digests",
    *,
    on_bytes: Callable[[int], object] = lambda count: None,
) -> Iterator[Finding]:
    """Verify checkpoints one after the other, then report the record files that are damaged.

    If one is not sound, the directory is read again before that is said: a running process may have retired or replaced
    the checkpoint. The first 16 are said as soon as they are found, others after all payloads.

    Args:
        catalog: The directory, as `checkpointer.tools.catalog.look_at` returns it.
        records: Which of its checkpoints.
        depth: How closely to look.
        on_bytes: Called with the number of bytes after each read.

    Example:
        >>> from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy
        >>> from checkpointer.testing import MemoryStorage
        >>> from checkpointer.tools.catalog import look_at
        >>> storage = MemoryStorage()
        >>> with CheckpointManager(storage, Policy(EverySteps(1), [KeepLast(1)]), state=lambda: {"w": 1}) as manager:
        ...     decision = manager.observe({}, step=1, epoch=0)
        >>> catalog = look_at(storage)
        >>> list(verify_all(catalog, catalog.records, "contents"))
        [Finding(name='epoch=0-step=1.ckpt', problem='', calls=(), by='', is_retired=False)]
    """
    storage = CountingStorage(catalog.storage, on_bytes)
    listed = {name: stat.size for name, stat in catalog.files.items()}
    later: list[tuple[Record, Finding]] = []
    at_once = _AT_ONCE
    for record in records:
        is_listed = depth == "sizes" and listed.get(record.name) == record.size
        finding = Finding(name=record.name) if is_listed else verify_one(storage, record, depth)
        if finding:
            yield finding
        elif at_once:
            at_once -= 1
            yield from _looked_at_again(catalog, storage, [(record, finding)], depth)
        else:
            later.append((record, finding))
    yield from _looked_at_again(catalog, storage, later, depth)
    for path, error in catalog.damaged.items():
        yield Finding(name=path, problem=str(error))


def _looked_at_again(
    catalog: Catalog, storage: Storage, bad: Sequence[tuple[Record, Finding]], depth: Depth
) -> Iterator[Finding]:
    """Yield what holds of checkpoints that were not sound, after reading the directory again."""
    for _ in range(_LOOKS if bad else 0):
        now, before, bad = catalog.again(), bad, []
        for record, finding in before:
            if not now.lacks(record):
                yield finding
            elif (found := now.current(record.name)) is None:
                yield Finding(name=record.name, is_retired=True)
            elif again := verify_one(storage, found, depth):
                yield again
            else:
                bad.append((found, again))
        if not bad:
            return
    yield from (finding for _, finding in bad)


def _look_into(storage: Storage, record: Record) -> tuple[str, ...]:
    """Raise unless all that the payload's tensors need is there; return what an unpickler would call."""
    if record.format not in ("torch", "safetensors", "dcp", "folder"):
        return ()  # The digest is all that shows damage in a format of the user's own.
    with open_contents(storage, record.name) as contents:
        if problems := [*contents.problems()][:3]:
            raise CorruptError("; ".join(problems))
        calls = contents.calls
    check_sums(storage, record.name)
    return calls


def check_sums(storage: Storage, name: str) -> bool:
    """Compare each part of a zip file with the checksum it was written with; return whether it is a zip file.

    Raises:
        CorruptError: If a part differs, or cannot be read.
    """
    if name not in storage.list(name):
        return False
    with storage.open(name) as stream:
        if stream.read(2) != b"PK":
            return False
        stream.seek(0)
        bad = bad_member(stream)
    if bad:
        msg = f"its part {bad} has other bytes than its checksum says"
        raise CorruptError(msg)
    return True
