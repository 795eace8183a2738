"""``checkpointer rm``: remove named checkpoints."""

from __future__ import annotations

from typing import Annotated

from checkpointer._display import count_text, size_text
from checkpointer.cli import options, output
from checkpointer.cli.choose_run import find_all
from checkpointer.records.record import Record
from checkpointer.tools.catalog import Catalog
from checkpointer.tools.prune import remove, why_not_removed


def rm_command(
    directory: options.Directory,
    names: Annotated[list[str], options.argument("NAME...", "Names or steps.", options.complete_name)],
    access: options.Access,
    apply: options.Apply = False,
    run: options.Among = None,
    as_json: options.Json = False,
) -> None:
    """Show the checkpoints of these names; with --apply remove them, payload and record.

    If one of them is pinned, or an alias points to it, nothing is removed.

    Example: checkpointer rm runs/digits 190
    """
    options.look(directory, access)
    with options.changing(directory, access) as (catalog, journal):
        records = find_all(catalog, names, run)
        stay = {record.name: why for record in records if (why := why_not_removed(catalog, record))}
        gone = remove(catalog, records, journal) if apply else ()
    if as_json:
        going = [record.name for record in records if record.name not in stay]
        output.print_json({"going": going, "stay": stay, "removed": [record.name for record in gone]})
    else:
        _print(catalog, records, stay, is_done=apply)
    output.leave_if(bool(stay) or (apply and len(gone) < len(records)))


def _print(catalog: Catalog, records: list[Record], stay: dict[str, str], *, is_done: bool) -> None:
    for record in records:
        if record.name in stay:
            output.print_line(f"stays  {record.name}: {stay[record.name]}")
        else:
            output.print_line(f"{'gone ' if is_done else 'drop '}  {record.name}: step {record.step}")
    going = [record for record in records if record.name not in stay]
    if is_done:
        size = size_text(sum(record.size for record in going))
        output.print_line(f"removed {count_text(len(going), 'checkpoint')} ({size})")
        return
    output.print_line(output.would_remove(going))
    for run, label in dict.fromkeys((record.run, record.label) for record in going):
        newest = catalog.manifest(run, label).newest
        if newest in going:
            left = [r for r in catalog.manifest(run, label).live if r not in going]
            then = f"the run would go on from {left[-1].name} (step {left[-1].step})" if left else "none of it is left"
            output.say(f"{newest.name} is the newest of run {run}; then {then}")
