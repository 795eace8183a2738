"""Makes records of checkpoints that Lightning, the Hugging Face Trainer or a bare ``torch.save`` wrote."""

from __future__ import annotations

import os
import re
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Final

import attrs

from checkpointer._display import some_of
from checkpointer.commit.aliases import mark, read_marker
from checkpointer.commit.index import record_path
from checkpointer.commit.journal import Journal
from checkpointer.commit.signing import refuse_unsigned
from checkpointer.commit.transaction import Transaction
from checkpointer.errors import CheckpointerError, CorruptError, NotFoundError, PolicyError, SaveError, reading
from checkpointer.ports import Storage, SupportsPaths, SupportsSweep
from checkpointer.records.names import has_surrogate
from checkpointer.records.record import ADOPTED, NO_EPOCH, Record, check_readable
from checkpointer.tools.adopt_files import Said, Units, find_units, read_file, read_folder
from checkpointer.tools.adopt_names import COUNTERS, Pattern, as_pattern, copy_of, folder_of, matches, stem_of
from checkpointer.tools.catalog import Catalog
from checkpointer.tools.payloads import directories_above

_CHUNK: Final = 1 << 22
_EXPORT: Final = (
    "it is a model alone, as trainer.save_model() writes it, and has no step; to adopt it too pass --step NAME=STEP"
)


@attrs.frozen(kw_only=True)
class Adoption:
    """Files and folders that can be adopted, and those that cannot."""

    found: tuple[Said, ...]
    """In the order of their steps: each has one, its own or one that it was given."""
    refused: Mapping[str, str]
    """Checkpoints that could not be adopted, each with the reason."""
    aliases: Mapping[str, str] = attrs.field(factory=dict)
    """Files that are a copy of a checkpoint or a link to one, such as ``last.ckpt``, each with its name."""
    beside: Mapping[str, str] = attrs.field(factory=dict)
    """Files that need no record, because they belong to others or repeat one, each with the reason."""
    unused: str = ""
    """Why the steps of an epoch were of no use; empty if they were."""


def find_foreign(
    catalog: Catalog,
    steps: Mapping[str, int] | None = None,
    *,
    steps_per_epoch: int | None = None,
    patterns: Iterable[str] = (),
) -> Adoption:
    """Find step, epoch and scores of the files that have no record. Nothing is unpickled, and nothing is changed.

    The page of the command says which keys and names count for which writer. Files that belong together are adopted
    as a folder, or are left. A directory below that has records of its own is left out.

    Args:
        catalog: The directory, from `checkpointer.tools.catalog.look_at`.
        steps: Steps by name, for files that do not have their own.
        steps_per_epoch: Optimizer steps of an epoch. If a file has an epoch only, its step is that of all epochs that
            are finished.
        patterns: What names say, such as ``model_{step}_{acc}.pt``. It takes precedence over the files.

    Raises:
        NotFoundError: If ``steps`` has a name that cannot be adopted.
        PolicyError: If a pattern is not one, or if no name fits it; or if ``steps_per_epoch`` is of no use, and
            the number of a name became a step.
    """
    steps = steps or {}
    lost = _lost_aliases(catalog)
    taken = {record.name for record in catalog.records} | set(catalog.aliases).difference(lost)
    units = find_units(catalog.files, taken | {entry.record.name for entry in catalog.unfinished})
    _check_steps({name: step for name, step in steps.items() if name not in taken}, units)
    named = matches([*map(Pattern.parse, patterns)], (*units.folders, *units.files), taken)
    read, links, refused = _read_all(catalog.storage, units, named)
    numbered = _with_numbers(read)
    unused = "" if steps_per_epoch is None else _why_unused(numbered, steps, steps_per_epoch)
    said = [attrs.evolve(item, step=_step(item, steps, steps_per_epoch)) for item in numbered]
    refused |= _parts(read, {*steps, *named}) | _parts(said)
    found = []
    exports = {item.name: _EXPORT for item in said if item.step is None and item.is_export}
    for item in said:
        if item.name in exports:
            continue
        if item.step is None:
            refused.setdefault(item.name, _no_step(item))
        elif item.name not in refused:
            try:
                check_readable(_draft(catalog, item, run="", serial=1))
                found.append(item)
            except (SaveError, OSError) as error:
                refused[item.name] = str(error)
    aliases, beside = _copies(catalog, found, steps)
    kept = [item for item in found if not any(item.name in some for some in (aliases, beside, lost))]
    there = {record.name for record in catalog.records} | {item.name for item in kept}
    aliases |= {link: target for link, target in links.items() if target in there}
    refused |= {
        link: f"it is a link to {name}, which has no record" for link, name in links.items() if name not in there
    }
    return Adoption(
        found=tuple(sorted(kept, key=lambda item: (item.step, item.name))),
        refused={name: why for name, why in refused.items() if name not in lost},
        aliases=aliases,
        beside=units.left | exports | beside,
        unused=unused,
    )


def _lost_aliases(catalog: Catalog) -> set[str]:
    """Return the aliases that were adopted and whose file is another one now, such as a copy by ``cp -r``."""
    journal = Journal(catalog.storage, "", catalog.trust)
    unknown = [alias for alias, target in catalog.aliases.items() if not target]
    return {alias for alias in unknown if read_marker(journal, alias).get("target")}


def _read_all(
    storage: Storage, units: Units, named: Mapping[str, Mapping[str, float]]
) -> tuple[list[Said], dict[str, str], dict[str, str]]:
    """Return what each file or folder says, the target of each link, and why a name is refused."""
    read: list[Said] = []
    links: dict[str, str] = {}
    refused = dict(units.refused)
    for name in (*units.folders, *units.files):
        try:
            with reading(name):
                if target := _link(storage, name):
                    links[name] = target
                else:
                    read.append(_with_fields(_read(storage, name, units), named.get(name, {})))
        except (CheckpointerError, OSError) as error:
            refused[name] = str(error).removeprefix(f"{name}: ")
    return read, links, refused


def _with_fields(said: Said, fields: Mapping[str, float]) -> Said:
    """Return what a pattern says of a name, and the rest from the file."""
    if not fields:
        return said
    step, epoch, epochs = (int(fields[key]) if key in fields else None for key in COUNTERS)
    scores = {key: value for key, value in fields.items() if key not in COUNTERS}
    if epochs is not None:
        epoch = max(epochs - 1, 0)
    return attrs.evolve(
        said,
        step=said.step if step is None else step,
        epoch=said.epoch if epoch is None else epoch,
        epoch_end=said.epoch_end if epoch is None else epochs != 0,
        number=None,
        metrics={**said.metrics, **scores},
    )


def _with_numbers(read: Sequence[Said]) -> list[Said]:
    """Return them with the only number of a name as the step, in folders where no other file has a step."""
    own = {folder_of(item.name) for item in read if item.step is not None and not copy_of(item.name)}
    is_step = [item.step is None and folder_of(item.name) not in own for item in read]
    return [attrs.evolve(item, step=item.number) if takes else item for item, takes in zip(read, is_step, strict=True)]


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
        owner = _directory_above(storage.local_path(""), name)
        if owner:
            msg = f"it is a checkpoint of the directory {owner}, which has a record of it"
            raise CorruptError(msg)
    return read_folder(storage, name) if name in units.folders else read_file(storage, name)


def _link(storage: Storage, name: str) -> str:
    """Return what a link within the directory leads to; empty if it is not a link.

    Raises:
        CorruptError: If it leads out of the directory.
    """
    if not isinstance(storage, SupportsPaths) or not os.path.islink(storage.local_path(name)):
        return ""
    real, root = (os.path.realpath(storage.local_path(path)) for path in (name, ""))
    target = os.path.relpath(real, root).replace(os.sep, "/")
    if target.startswith("../"):
        msg = f"it is a link to {real}, which is outside the directory"
        raise CorruptError(msg)
    return target


def _directory_above(root: str, name: str) -> str:
    """Return the directory above ``root`` that has a record of a file in ``root``; empty if there is none."""
    for above, inside in directories_above(Path(root)):
        path = PurePosixPath(inside, name)
        if any(os.path.exists(above / record_path(str(one))) for one in (path, *path.parents[:-1])):
            return str(above)
    return ""


def _step(said: Said, given: Mapping[str, int], steps_per_epoch: int | None) -> int | None:
    step = given.get(said.name, said.step)
    if step is None and said.epoch is not None and steps_per_epoch is not None:
        return (said.epoch + said.epoch_end) * steps_per_epoch
    return step


def _why_unused(read: Sequence[Said], given: Mapping[str, int], steps_per_epoch: int) -> str:
    """Return why ``steps_per_epoch`` gives no file its step; empty if it does, or if there is no file.

    Raises:
        PolicyError: If the number of a name became a step, because it may have been meant as an epoch.
    """
    found = [item for item in read if item.name not in given]
    if not found or any(item.step is None and item.epoch is not None for item in found):
        return ""
    why = f"--steps-per-epoch {steps_per_epoch} has no effect"
    numbered = next((item for item in found if item.step is not None and item.step == item.number), None)
    if numbered is not None:
        msg = (
            f"{why}: {numbered.name} has its number {numbered.number} as its step; if this is an epoch pass --pattern "
            f"{as_pattern(numbered.name)!r} too, else leave it out"
        )
        raise PolicyError(msg)
    return f"{why}: no file has an epoch without a step"


def _no_step(said: Said) -> str:
    how = "pass its step: --step NAME=STEP"
    if said.number is not None:
        return (
            f"its number {said.number} may be a step or an epoch, because other files here have a step of their own; "
            f"say which: --pattern {as_pattern(said.name)!r} if so many epochs are finished, {{epoch}} instead if it "
            "counts from 0, or {step}"
        )
    if said.epoch is not None:
        return f"it has an epoch ({said.epoch}) and no step; {how}, or --steps-per-epoch N for all such files"
    if said.writer == "a trainer":
        return f"it is a folder of files that belong together, and has no step; to adopt it as a whole {how}"
    return f"neither the file nor its name has a step or an epoch; {how}, or --pattern 'NAME_{{step}}_{{score}}.pt'"


def _parts(said: Iterable[Said], given: Collection[str] = ()) -> dict[str, str]:
    """Return the files that share a folder and a step, such as a generator and its discriminator, or two runs.

    If they were two checkpoints of one run, a policy could keep one and remove the other. If all files of a group are
    ``given`` their steps, only these steps count.
    """
    files = [(folder_of(item.name), item) for item in said if item.writer == "torch.save"]
    groups: defaultdict[tuple[str, Collection[str], int | tuple[str, ...]], list[Said]] = defaultdict(list)
    for folder, item in files:
        digits = re.findall(r"\d+", stem_of(item.name))
        for number in (item.step, tuple(digits) or None):
            if number is not None:
                groups[folder, copy_of(item.name), number].append(item)
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


def _copies(catalog: Catalog, found: Sequence[Said], given: Container[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the files that are called last or best and repeat another checkpoint of the same step.

    If they have its bytes, they are aliases of it. Else a file that is called last has a reason, unless its step is
    ``given``. A best file is a checkpoint of its own then: it may have been saved before the validation.
    """
    there: defaultdict[tuple[str, int | None], list[str]] = defaultdict(list)
    steps = [(item.name, item.step) for item in found if not copy_of(item.name)]
    for name, step in [*((record.name, record.step) for record in catalog.records), *steps]:
        there[folder_of(name), step].append(name)
    aliases, beside = {}, {}
    for item in sorted(found, key=lambda item: ("best" not in copy_of(item.name), item.name)):
        kind, others = copy_of(item.name), there[folder_of(item.name), item.step]
        if not kind:
            continue
        equal = next((other for other in others if _has_bytes_of(catalog, item.name, other)), "")
        if equal:
            aliases[item.name] = equal
        elif others and "best" not in kind and item.name not in given:
            beside[item.name] = f"it has the same step as {others[0]}, so it is a copy that is called last"
        else:
            others.append(item.name)
    return aliases, beside


def _has_bytes_of(catalog: Catalog, name: str, other: str) -> bool:
    files = catalog.files
    if name not in files or other not in files or files[name].size != files[other].size:
        return False
    with catalog.storage.open(name) as one, catalog.storage.open(other) as two:
        while (chunk := one.read(_CHUNK)) == two.read(_CHUNK):
            if not chunk:
                return True
    return False


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
        run: Id of the run that they become part of. None makes a new one for each folder, or takes the one that its
            adopted checkpoints have.
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
    if run is None:
        runs |= {folder_of(record.name): record.run for record in catalog.records if record.is_adopted}
    lines = {record.run: record.line for record in catalog.records}
    made = {record.name: record for record in catalog.records}
    serial = 1 + max((record.serial for record in catalog.records), default=0)
    for number, item in enumerate(adoption.found):
        try:
            draft = _draft(catalog, item, run=runs[folder_of(item.name)], serial=serial + number)
            record = Transaction(journal).adopt(attrs.evolve(draft, line=lines.get(draft.run, ())))
        except OSError as error:
            if on_bad is None:
                raise
            on_bad(item.name, error)
            continue
        made[record.name] = record
        yield record
    for alias, target in adoption.aliases.items():
        if target in made:
            mark(journal, alias, made[target].label, "", copy=(target, catalog.files.get(alias)))


def _draft(catalog: Catalog, item: Said, *, run: str, serial: int) -> Record:
    said = ("name", "step", "metrics", "format", "contents")
    is_epoch_known = item.epoch is not None
    return Record(
        **{field: getattr(item, field) for field in said},
        epoch=item.epoch or 0,
        epoch_end=item.epoch_end and is_epoch_known,
        time=_time(catalog, item.name),
        size=0,
        digest="",
        reason=f"{ADOPTED}written by {item.writer}{'' if is_epoch_known else NO_EPOCH}",
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
