"""``checkpointer adopt``: make records of checkpoints that other programs wrote."""

from __future__ import annotations

from typing import Annotated

import attrs

from checkpointer._display import count_text, number_text, some_of
from checkpointer.cli import options, output
from checkpointer.commit.index import record_path
from checkpointer.commit.journal import Journal
from checkpointer.commit.signing import refuse_unsigned
from checkpointer.errors import NotFoundError, PolicyError
from checkpointer.records.record import Record
from checkpointer.tools.adopt import Adoption, adopt, find_foreign
from checkpointer.tools.catalog import Catalog

Steps = Annotated[
    list[str] | None, options.option("--step NAME=STEP", "The step of a file that has none; may be given again.")
]
StepsPerEpoch = Annotated[
    int | None,
    options.option(
        "--steps-per-epoch N", "For files with an epoch and no step: N steps for each finished epoch.", min=1
    ),
]
Patterns = Annotated[
    list[str] | None,
    options.option(
        "--pattern PATTERN",
        "How names are built, such as 'model_{step}_{acc}.pt'; {epoch} counts from 0, {epochs} finished ones. "
        "May be given again.",
    ),
]
NewRun = Annotated[str | None, options.option("--run ID", "Run of the records. Without it: a new run for each folder.")]


def adopt_command(
    directory: options.Directory,
    access: options.Access,
    dry_run: Annotated[bool, options.option("--dry-run", "Only show the records that would be made.")] = False,
    step: Steps = None,
    steps_per_epoch: StepsPerEpoch = None,
    pattern: Patterns = None,
    run: NewRun = None,
    as_json: options.Json = False,
) -> None:
    """Make records of checkpoints that Lightning, the HF Trainer or torch.save wrote, so that they can be managed.

    Step, epoch and scores are read from the files, without unpickling them. The files stay as they are.
    Exits with 1 if a checkpoint could not be adopted.

    Example: checkpointer adopt lightning_logs/version_0/checkpoints --dry-run
    """
    steps = dict(map(_step, step or ()))
    made: list[Record] = []
    with options.changing(directory, access) as (catalog, journal):
        refuse_unsigned(catalog.signed, catalog.place, journal.trust)
        adoption = find_foreign(catalog, steps, steps_per_epoch=steps_per_epoch, patterns=pattern or ())
        _check_any(catalog, adoption)
        if not dry_run:
            made, adoption = _adopt(catalog, adoption, journal, run)
    if adoption.unused:
        output.say(adoption.unused)
    elif (steps or steps_per_epoch or pattern) and catalog.records and not (adoption.found or adoption.aliases):
        first = record_path(catalog.records[0].name)
        output.say(f"what has a record is not read again; to adopt a file anew, remove its record, such as {first}")
    if as_json:
        left = {"refused": dict(adoption.refused), "beside": dict(adoption.beside)}
        output.print_json({"adopted": _as_data(adoption, made), "aliases": dict(adoption.aliases), **left})
    else:
        _print(adoption, dry_run=dry_run, before=len(catalog.records))
    nothing = not adoption.found and not catalog.records
    output.leave_if(bool(adoption.refused) or nothing)


def _check_any(catalog: Catalog, adoption: Adoption) -> None:
    if not (adoption.found or adoption.refused or adoption.beside or catalog.records):
        below = f"; the directories below have records: {some_of(catalog.below)}" if catalog.below else ""
        msg = (
            f"{catalog.place} has no file that could be adopted: *.ckpt, *.pt, *.pth, *.pth.tar, *.safetensors, "
            f"checkpoint-N{below}"
        )
        raise NotFoundError(msg)


def _adopt(catalog: Catalog, adoption: Adoption, journal: Journal, run: str | None) -> tuple[list[Record], Adoption]:
    """Make the records; return them, and the adoption with what could not be read."""
    bad: dict[str, str] = {}
    made = [*adopt(catalog, adoption, journal, run=run, on_bad=lambda name, error: bad.update({name: str(error)}))]
    if made and (before := [record for record in catalog.records if not record.is_adopted]):
        output.say(
            f"a training here still goes on from {before[-1].name} of run {before[-1].run}; to go on from "
            f"{made[-1].name}, name it in resume() or restore()"
        )
    found = tuple(item for item in adoption.found if item.name not in bad)
    return made, attrs.evolve(adoption, found=found, refused={**adoption.refused, **bad})


def _step(text: str) -> tuple[str, int]:
    name, equals, number = text.rpartition("=")
    if not equals or not number.isdecimal():
        msg = f"--step {text!r}: expected NAME=STEP, such as model_a.pt=1000"
        raise PolicyError(msg)
    return name, int(number)


def _as_data(adoption: Adoption, made: list[Record]) -> list[dict[str, object]]:
    if made:
        return [record.to_dict() for record in made]
    return [
        {"name": one.name, "step": one.step, "epoch": one.epoch or 0, "metrics": one.metrics, "writer": one.writer}
        for one in adoption.found
    ]


def _print(adoption: Adoption, *, dry_run: bool, before: int) -> None:
    for item in adoption.found:
        scores = ", ".join(f"{name}={number_text(value)}" for name, value in item.metrics.items())
        epoch = f", epoch {item.epoch}" if item.epoch is not None else ""
        what = f"step {item.step}{epoch}{f', {scores}' if scores else ''}"
        output.print_line(f"{'would adopt' if dry_run else 'adopted'}  {item.name}: {what} ({item.writer})")
    for name, target in adoption.aliases.items():
        output.print_line(f"alias  {name}: the same as {target}")
    for name, why in {**adoption.beside, **adoption.refused}.items():
        output.print_line(f"left  {name}: {why}")
    left = len(adoption.refused) + len(adoption.beside)
    count = count_text(len(adoption.found), "checkpoint")
    had = f", {before} had a record already" if before else ""
    output.print_line(f"{count} {'would be ' if dry_run else ''}adopted{had}, {left} left unchanged")
