"""Makes records of checkpoints that Lightning, the Hugging Face Trainer or a bare ``torch.save`` wrote."""

from __future__ import annotations

import os
import re
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Final

import attrs

from checkpointer._display import some_of
from checkpointer.commit.index import HOME, record_path
from checkpointer.commit.journal import Journal
from checkpointer.commit.signing import refuse_unsigned
from checkpointer.commit.transaction import Transaction
from checkpointer.errors import CheckpointerError, CorruptError, NotFoundError, SaveError, reading
from checkpointer.ports import Storage, SupportsPaths, SupportsSweep
from checkpointer.records.names import has_surrogate
from checkpointer.records.record import ADOPTED, Record, check_readable
from checkpointer.tools.catalog import Catalog
from checkpointer.tools.foreign import COPIES, Said, Units, find_units, parts_of, read_file, read_folder

_NEUTRAL: Final = frozenset({"model", "checkpoint", "ckpt", "weights", "state", "epoch", "step", "iter", "v"})
"""Parts of a name that do not say whether a file is a copy."""


@attrs.frozen(kw_only=True)
class Found(Said):
    """A file or folder that says its step, or is given it."""

    step: int
    epoch: int = 0


@attrs.frozen(kw_only=True)
class Adoption:
    """Files and folders that can be adopted, and those that cannot."""

    found: tuple[Found, ...]
    """In the order of their steps."""
    refused: Mapping[str, str]
    """Files and folders that stay as they are, each with the reason."""


def find_foreign(
    catalog: Catalog, steps: Mapping[str, int] | None = None, *, steps_per_epoch: int | None = None
) -> Adoption:
    """Find step, epoch and scores of the files that have no record. Nothing is unpickled, and nothing is changed.

    The page of the command says which keys and names count for which writer. Files that belong together are adopted
    as a folder, or are left. A directory below that has records of its own is left out.

    Args:
        catalog: The directory, from `checkpointer.tools.catalog.look_at`.
        steps: Steps by name, for files that do not have their own.
        steps_per_epoch: Optimizer steps of an epoch. If a file has an epoch only, its step is the product of both.

    Raises:
        NotFoundError: If ``steps`` has a name that cannot be adopted.
    """
    steps = steps or {}
    taken = {record.name for record in catalog.records} | set(catalog.aliases)
    units = find_units(catalog.files, taken | {entry.record.name for entry in catalog.unfinished})
    _check_steps(steps, units)
    read: list[Said] = []
    refused = dict(units.left)
    for name in (*units.folders, *units.files):
        try:
            with reading(name):
                read.append(_read(catalog.storage, name, units))
        except (CheckpointerError, OSError) as error:
            refused[name] = str(error).removeprefix(f"{name}: ")
    said = [attrs.evolve(item, step=_step(item, steps, steps_per_epoch)) for item in read]
    refused |= _parts(read, steps) | _parts(said)
    found = []
    for item in said:
        if item.step is None:
            refused.setdefault(item.name, _no_step(item))
        elif item.name not in refused:
            found.append(Found(**(attrs.asdict(item, recurse=False) | {"epoch": item.epoch or 0})))
            if problem := _problem(catalog, found[-1]):
                refused[item.name] = problem
    refused |= _copies(found, catalog.records)
    kept = sorted((item for item in found if item.name not in refused), key=lambda item: (item.step, item.name))
    return Adoption(found=tuple(kept), refused=refused)


def _problem(catalog: Catalog, item: Found) -> str:
    """Return why a record of an item could not be read again; empty if it could."""
    try:
        check_readable(_draft(catalog, item, run="", serial=1))
    except (SaveError, OSError) as error:
        return str(error)
    return ""


def _check_steps(steps: Mapping[str, int], units: Units) -> None:
    there = (*units.folders, *units.files)
    for name in steps:
        if name in units.left:
            msg = f"{name} is given a step, but cannot be adopted alone: {units.left[name]}"
            raise NotFoundError(msg)
        if name in there:
            continue
        whole = next((folder for folder in units.folders if name.startswith(f"{folder}/")), None)
        if whole:
            msg = f"{name} is a part of {whole}, which is adopted as a whole or not at all; pass --step {whole}=STEP"
        else:
            msg = f"{name} is given a step, but no file or folder to adopt has that name (have: {some_of(there)})"
        raise NotFoundError(msg)


def _read(storage: Storage, name: str, units: Units) -> Said:
    if has_surrogate(name):
        msg = "its name is not valid Unicode, so a record could not have it; rename it"
        raise CorruptError(msg)
    if isinstance(storage, SupportsPaths):
        path = storage.local_path(name)
        if os.path.islink(path):
            msg = "it is a link to another file; an alias is made when a manager saves"
            raise CorruptError(msg)
        owner = _directory_above(path, storage.local_path("").rstrip("/"))
        if owner:
            msg = f"it is a checkpoint of the directory {owner}, which has a record of it"
            raise CorruptError(msg)
    return read_folder(storage, name) if name in units.folders else read_file(storage, name)


def _directory_above(path: str, root: str) -> str:
    """Return the directory above ``root`` that has a record of what lies at ``path``; empty if there is none."""
    while (above := os.path.dirname(root)) != root:
        root = above
        parts = os.path.relpath(path, root).replace(os.sep, "/").split("/")
        names = ("/".join(parts[: count + 1]) for count in range(len(parts)))
        if os.path.isdir(f"{root}/{HOME}") and any(os.path.exists(f"{root}/{record_path(name)}") for name in names):
            return root
    return ""


def _step(said: Said, given: Mapping[str, int], steps_per_epoch: int | None) -> int | None:
    step = given.get(said.name, said.step)
    if step is None and said.epoch is not None and steps_per_epoch is not None:
        return said.epoch * steps_per_epoch
    return step


def _no_step(said: Said) -> str:
    how = "pass its step: --step NAME=STEP"
    if said.epoch is not None:
        return f"it has an epoch ({said.epoch}) and no step; {how}, or --steps-per-epoch N for all such files"
    if said.writer == "a trainer":
        return f"it is a folder of files that belong together, and has no step; to adopt it as a whole {how}"
    return f"neither the file nor its name has a step or an epoch; {how}"


def _parts(said: Iterable[Said], given: Collection[str] = ()) -> dict[str, str]:
    """Return the files that share a folder and a step, such as a generator and its discriminator, or two runs.

    If they were two checkpoints of one run, a policy could keep one and remove the other. If all files of a group are
    ``given`` their steps, only these steps count.
    """
    files = [(item.name.rpartition("/")[0], item) for item in said if item.writer == "torch.save"]
    groups: defaultdict[tuple[str, Collection[str], int | tuple[str, ...]], list[Said]] = defaultdict(list)
    for folder, item in files:
        digits = re.findall(r"\d+", item.name[len(folder) :].rpartition(".")[0])
        for number in (item.step, tuple(digits) or None):
            if number is not None:
                groups[folder, parts_of(item.name) & COPIES, number].append(item)
    parts = {}
    for (_, _, number), group in groups.items():
        # Equal numbers in two names mean one step only where a file does not say its own.
        is_one = isinstance(number, int) or any(item.step is None for item in group)
        is_open = any(item.name not in given for item in group)
        for item, other in zip(group, (group[-1], *group), strict=False) if is_one and is_open and group[1:] else ():
            parts[item.name] = (
                f"it has the same step as {other.name}: they are parts of one checkpoint, or of two "
                "runs, and prune would remove one without the other; put what belongs together into a folder"
            )
    steps = {(folder, item.step) for folder, item in files if item.name in parts and item.step is not None}
    for folder, item in files:
        if (folder, item.step) in steps:
            parts.setdefault(item.name, "it has the same step as several files that belong together")
    return parts


def _copies(found: Sequence[Found], records: Iterable[Record]) -> dict[str, str]:
    """Return the files that are called last and have the step of another checkpoint."""
    copies: dict[str, str] = {}
    there = {record.step: record.name for record in records}
    last = [item for item in found if (parts := parts_of(item.name) - _NEUTRAL) and parts <= COPIES - {"best"}]
    there |= {item.step: item.name for item in found if item not in last}
    for item in last:
        other = there.setdefault(item.step, item.name)
        if other != item.name:
            copies[item.name] = f"it has the same step as {other}, so it is a copy that is called last"
    return copies


# Making records


def adopt(
    catalog: Catalog,
    adoption: Adoption,
    journal: Journal,
    *,
    run: str | None = None,
    on_bad: Callable[[str, Exception], object] | None = None,
) -> Iterator[Record]:
    """Make a record of each, oldest step first. Its digest is computed; its payload is not changed.

    Args:
        catalog: The directory, as it was looked at.
        adoption: What `find_foreign` found.
        journal: Writes to the same storage.
        run: Id of the run that they become part of; None makes a new one for each folder.
        on_bad: Called with the name and the error if a payload cannot be read; the others go on. None: it is raised.

    Yields:
        Each record, once it is durable.

    Raises:
        UntrustedError: If the directory has signed records, and the journal has no key.

    Example:
        >>> import io, torch
        >>> from checkpointer.tools.catalog import look_at
        >>> from checkpointer.testing import MemoryStorage
        >>> storage, stream = MemoryStorage(), io.BytesIO()
        >>> torch.save({"model": {"w": torch.ones(1)}, "step": 7, "val_loss": 0.5}, stream)
        >>> storage.write("a.pt", stream.getvalue())
        >>> catalog = look_at(storage)
        >>> (record,) = adopt(catalog, find_foreign(catalog), Journal(storage, "me"))
        >>> record.step, dict(record.metrics)
        (7, {'val_loss': 0.5})
    """
    refuse_unsigned(catalog.signed, catalog.place, journal.trust)
    if isinstance(journal.storage, SupportsSweep):
        journal.storage.prepare()
    # Two folders are two trainings. If they were one run, a policy would keep only the best of both.
    runs: defaultdict[str, str] = defaultdict(lambda: run or uuid.uuid4().hex[:12])
    serial = 1 + max((record.serial for record in catalog.records), default=0)
    line = next((record.line for record in reversed(catalog.records) if record.run == run), ())
    for number, item in enumerate(adoption.found):
        try:
            draft = _draft(catalog, item, run=runs[item.name.rpartition("/")[0]], serial=serial + number)
            record = Transaction(journal).adopt(attrs.evolve(draft, line=line))
        except OSError as error:
            if on_bad is None:
                raise
            on_bad(item.name, error)
            continue
        yield record


def _draft(catalog: Catalog, item: Found, *, run: str, serial: int) -> Record:
    said = ("name", "step", "epoch", "epoch_end", "metrics", "format", "contents")
    return Record(
        **{field: getattr(item, field) for field in said},
        time=_time(catalog, item.name),
        size=0,
        digest="",
        reason=f"{ADOPTED}written by {item.writer}",
        run=run,
        serial=serial,
        token=uuid.uuid4().hex,
    )


def _time(catalog: Catalog, name: str) -> float:
    """Return when the payload was last written, as far as the storage says, else now."""
    storage = catalog.storage
    if isinstance(storage, SupportsPaths):
        return os.stat(storage.local_path(name)).st_mtime
    stat = catalog.files.get(name)
    return stat.modified_s if stat is not None and stat.modified_s is not None else time.time()
