"""Which checkpoint to resume from; before a training, those that are not whole are renamed, and never deleted."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from checkpointer import HMACKey, Record
from checkpointer.commit.index import HOME, record_path
from checkpointer.commit.journal import Journal, holding
from checkpointer.commit.lease import LEASE_S, as_lease
from checkpointer.errors import CorruptError, NoValidCheckpointError, RunInUseError, warn
from checkpointer.ports import Storage
from checkpointer.restore.load import verify
from checkpointer.storage import open_storage
from checkpointer.storage.digests import size_of
from checkpointer.storage.owner import is_live, temporary_owner
from checkpointer.tools.catalog import look_at
from checkpointer.tools.sweep import sweep
from checkpointer_transformers.integrity import checkpoints_of, problem_of, step_of
from checkpointer_transformers.lock import Claim

_UNSIGNED: Final = (
    "it has no signed record: it was planted, or saved without trust=. If you know that it is yours, copy it into "
    "another directory, and resume from there"
)
_ASIDE: Final = f"{HOME}/aside"
"""Where the records of renamed checkpoints are."""


def last_valid_checkpoint(directory: str | os.PathLike[str], *, trust: HMACKey | None = None) -> str | None:
    """Return the path of the newest whole ``checkpoint-<step>`` in a Trainer's directory; changes nothing.

    If a checkpoint has a record, its bytes are compared with the digest of the record. A checkpoint without a record
    counts if all its files are there and each one is complete. It does not count if ``trust`` is given, or if other
    checkpoints of the directory are signed.

    Args:
        directory: The Trainer's ``output_dir``.
        trust: The key that signed the records; None if they are not signed.

    Returns:
        The path, or None if the directory has no checkpoint to resume from.

    Raises:
        NoValidCheckpointError: If no checkpoint is valid, and at least one of them has a record, or lacks only the
            signature.

    Example:
        >>> from checkpointer_transformers import last_valid_checkpoint
        >>> last_valid_checkpoint("runs/of-no-trainer")  # None: the directory does not exist.
        >>> trainer.train(resume_from_checkpoint=last_valid_checkpoint("runs/bert"))  # doctest: +SKIP
    """
    folder = Path(directory)
    if not folder.is_dir():
        return None
    problems = []
    with _opened(folder) as (storage, _):
        for name, record, problem in _look(storage, folder, Claim.all_of(storage), trust):
            if record is not None and record.contents == "weights":
                continue
            if problem is None and record is None and trust is not None:
                problem = f"{name}: {_UNSIGNED}"
            if problem is None:
                return os.path.join(directory, name)
            problems += [problem] if record is not None or problem.endswith(_UNSIGNED) else []
    if problems:
        msg = f"no valid checkpoint in {folder}: {'; '.join(problems)}. Training does not start over silently"
        raise NoValidCheckpointError(msg)
    return None


def clear(folder: Path, options: Mapping[str, Any]) -> None:
    """Rename what is not whole, with a warning. If a live process trains here, nothing changes.

    It holds the run of what it renames: the process that writes it may be alive on another host. If that one sends no
    heartbeat for ``lease_s``, it is replaced.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    trust, lease = options.get("trust"), as_lease(options.get("lease_s", LEASE_S), options.get("takeover"))
    with _opened(folder) as (storage, owner):
        claims = Claim.all_of(storage)
        if not lease.takeover and any(is_live(claim.owner) for claim in claims):
            return
        if storage.list(HOME):
            sweep(storage, owner, trust)  # A dead process's unfinished changes are finished or undone first.
        journal, broken = Journal(storage, owner, trust), functools.partial(_broken, storage, folder, claims, trust)
        for run in dict.fromkeys(run for run, *_ in broken()):
            held = holding(journal, run, "", lease) if run else contextlib.nullcontext()
            with contextlib.suppress(RunInUseError), held:
                for _, name, record, problem in [one for one in broken() if one[0] == run]:
                    with journal.changing(aliases=[name]):
                        _rename(folder, name, record, problem)


def _broken(
    storage: Storage, folder: Path, claims: Sequence[Claim], trust: HMACKey | None
) -> Iterator[tuple[str, str, Record | None, str]]:
    """Yield each checkpoint that is not whole, as `_look` does, after its run: empty if no callback wrote it."""
    runs = {claim.writing: claim.run for claim in reversed(claims)}
    for name, record, problem in _look(storage, folder, claims, trust):
        if problem is not None:
            yield (record.run if record is not None else runs.get(name, "")), name, record, problem


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[tuple[Storage, str]]:
    with temporary_owner() as owner:
        yield open_storage(folder, owner), owner


def _look(
    storage: Storage, folder: Path, claims: Sequence[Claim], trust: HMACKey | None
) -> Iterator[tuple[str, Record | None, str | None]]:
    """Yield each checkpoint, newest first: its name, its record if it is committed, and why it is not whole.

    The newest whole one is compared with its digest, older ones by size. In a signed directory each needs a record.
    """
    catalog = look_at(storage, trust) if storage.list(HOME) else None
    records = {record.name: record for record in catalog.with_missing.records} if catalog is not None else {}
    limits = catalog.limits if catalog is not None else {}
    is_signed = catalog is not None and catalog.signed > 0
    writing = {claim.writing: claim for claim in reversed(claims)}
    names = {*checkpoints_of(folder), *(name for name in records if step_of(name) is not None)}
    is_newest = True
    for name in sorted(names, key=lambda name: step_of(name) or 0, reverse=True):
        record, claim = records.get(name), writing.get(name)
        if record is not None:
            problem = _differs(storage, record, thoroughly=is_newest)
        else:
            problem = claim.why_doubtful(limits) if claim is not None else ""
            problem = problem or problem_of(folder / name, ranks=claim.ranks if claim is not None else None)
            if problem is None and is_signed:
                problem = f"{name}: {_UNSIGNED}"
        is_newest = is_newest and problem is not None
        yield name, record, problem


def _differs(storage: Storage, record: Record, *, thoroughly: bool) -> str | None:
    if not thoroughly and size_of(storage, record.name, record.size) == record.size:
        return None
    try:
        verify(storage, record)
    except CorruptError as error:
        return str(error)
    return None


def _rename(folder: Path, name: str, record: Record | None, problem: str) -> None:
    msg = f"{folder / name} is not a whole checkpoint: {problem}"
    if (folder / name).exists():
        new = _free(folder, f"incomplete-{name}" if record is None else f"damaged-{name}")
        os.rename(folder / name, folder / new)
        msg += f". It is {new} now, so that nothing resumes from it; delete it if you do not need it"
    if record is not None:
        path = folder / record_path(name)
        (folder / _ASIDE).mkdir(exist_ok=True)
        aside = _free(folder / _ASIDE, path.name)
        os.replace(path, folder / _ASIDE / aside)
        msg += f". Its record is {_ASIDE}/{aside} now"
    warn(msg)


def _free(folder: Path, stem: str) -> str:
    name, version = stem, 0
    while os.path.lexists(folder / name):
        version += 1
        name = f"{stem}-v{version}"
    return name
