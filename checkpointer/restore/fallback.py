"""What a restore does if the first choice is damaged: it loads the next valid checkpoint, and warns why."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from checkpointer.commit.index import RECORDS
from checkpointer.errors import CorruptError, NoValidCheckpointError, RestoreError, warn
from checkpointer.ports import Storage, SupportsPaths
from checkpointer.records.record import Record
from checkpointer.restore.load import GoneError, Restored

_FEW = 5
"""How many problems an error names."""


@contextlib.contextmanager
def raising_unreachable(record: Record, storage: Storage) -> Iterator[None]:
    """If a remote storage does not answer, raise `RestoreError`, which ends the restore.

    The checkpoint is not bad, and going on from an older one would abandon it. If a local file cannot be read, that is
    an error of this checkpoint alone.
    """
    try:
        yield
    except OSError as error:
        if isinstance(storage, SupportsPaths) or isinstance(error, FileNotFoundError):
            raise
        msg = (
            f"{record.name} in {storage} could not be read ({type(error).__name__}: {error}); nothing was restored, "
            "because going on from an older checkpoint would abandon it. Try again, or restore one by name or step"
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
        UnsafePayloadError: At once, because an older checkpoint holds the same kind of objects.
    """
    problems = list(bad)
    all_gone = not problems
    for record in records:
        try:
            restored = load(record)
        except (CorruptError, OSError) as error:
            problems.append(str(error))
            all_gone = all_gone and isinstance(error, GoneError)
            if isinstance(error, CorruptError):
                on_bad(record)
            continue
        if problems:
            why = f"newer or better ones could not be used: {_few(problems)}"
            warn(f"restored {record.name} (step {record.step}), because {why}")
        return restored
    if problems:
        way_out = "restore one by name, or use an empty directory"
        if all_gone:
            way_out = f"put a payload back, or to start over remove the records in {RECORDS}, or use another directory"
        msg = f"no valid checkpoint: {_few(problems)}. Training does not start over silently: {way_out}"
        raise NoValidCheckpointError(msg)
    return None


def _few(problems: Sequence[str]) -> str:
    more = f"; and {len(problems) - _FEW} more" if len(problems) > _FEW else ""
    return "; ".join(problems[:_FEW]) + more
