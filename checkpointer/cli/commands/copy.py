"""``checkpointer copy``: a directory to another storage."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from checkpointer._display import count_text, size_text
from checkpointer.cli import options, output
from checkpointer.cli.choose_run import find_all
from checkpointer.errors import CorruptError
from checkpointer.tools.copy import Copying, copy


def copy_command(
    source: Annotated[str, options.argument("SOURCE", "Copy from this path or URL.")],
    target: Annotated[str, options.argument("TARGET", "Copy to this path or URL; it need not exist.")],
    access: options.Access,
    only: Annotated[
        list[str] | None, options.option("--only NAME", "Only this checkpoint; may be given again.")
    ] = None,
    run: options.Among = None,
    target_options: Annotated[
        str | None, options.option("--target-options JSON", "As --storage-options, for the target.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Copy checkpoints with their records and aliases. Each one is verified. Run it again after an interruption.

    A checkpoint that the target has already is not copied again. A damaged one is not copied, and then the command
    exits with 1. No file is replaced.

    Example: checkpointer copy runs/digits s3://bucket/digits
    """
    catalog = options.look(source, access)
    records = find_all(catalog, only, run) if only else None if run is None else catalog.of(run)
    bad: dict[str, CorruptError] = {}
    with (
        options.writing(target, options.Access(storage_options=target_options), new=True) as (storage, owner),
        output.progress("copying", 0) as bar,
    ):
        done = copy(
            catalog,
            storage,
            owner,
            records=records,
            trust=access.key,
            on_plan=lambda plan: bar(total=plan.bytes),
            on_bytes=bar,
            on_bad=lambda record, error: bad.update({record.name: error}),
        )
    _say(done, str(storage), bad, as_json=as_json)
    for error in bad.values():
        output.say(f"damaged: {error}")
    made = {alias for alias, *_ in done.aliases}
    gone = {*bad, *(record.name for record in done.retired)}
    for name in gone.difference(bad):
        output.say(f"{name} was not copied: a running process has retired it meanwhile")
    for alias, name in catalog.aliases.items():
        if name in bad:
            output.say(f"{alias} was not copied: {name} is damaged")
        elif name and alias not in made and records is None and name not in gone:
            output.say(f"{alias} was not copied: {storage} has a file of that name, which is not replaced")
        if not name:
            why = f"{catalog.place} does not say which checkpoint it is a copy of"
            output.say(f"{alias} was not copied: {why}; the next save makes it again")
    output.leave_if(output.say_damaged(catalog) or bool(bad) or (records is None and bool(catalog.missing)))


def _say(done: Copying, place: str, bad: Iterable[str], *, as_json: bool) -> None:
    if as_json:
        data = {
            "target": place,
            "copied": [record.name for record in done.missing],
            "there": [record.name for record in done.there],
            "retired": [record.name for record in done.retired],
            "damaged": [*bad],
            "aliases": {alias: name for alias, name, _ in done.aliases},
            "bytes": done.bytes,
        }
        output.print_json(data)
        return
    for record in done.missing:
        output.print_line(f"copied  {record.name}")
    for alias, name, how in done.aliases:
        output.print_line(f"{how:6}  {alias} -> {name}")
    copied = count_text(len(done.missing), "checkpoint")
    output.print_line(f"{copied} copied to {place} ({size_text(done.bytes)}), {len(done.there)} already there")
