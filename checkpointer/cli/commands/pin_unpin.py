"""``checkpointer pin`` and ``unpin``: keep a checkpoint, whatever the rules say."""

from __future__ import annotations

from typing import Annotated

from checkpointer.cli import options, output
from checkpointer.cli.choose_run import find_all
from checkpointer.tools.prune import set_pinned

Names = Annotated[list[str], options.argument("NAME...", "Names, steps or aliases.", options.complete_name)]


def pin_command(
    directory: options.Directory,
    names: Names,
    access: options.Access,
    run: options.Among = None,
    as_json: options.Json = False,
) -> None:
    """Pin checkpoints: no rule, no limit and no command removes them until they are unpinned.

    While a training runs, only its own manager can pin: manager.pin(name).

    Example: checkpointer pin runs/digits 190
    """
    _set_pinned(directory, names, access, run=run, pinned=True, as_json=as_json)


def unpin_command(
    directory: options.Directory,
    names: Names,
    access: options.Access,
    run: options.Among = None,
    as_json: options.Json = False,
) -> None:
    """Let the rules decide about checkpoints again. The next save, or prune, removes what no rule keeps.

    Example: checkpointer unpin runs/digits 190
    """
    _set_pinned(directory, names, access, run=run, pinned=False, as_json=as_json)


def _set_pinned(
    directory: str, names: list[str], access: options.Access, *, run: str | None, pinned: bool, as_json: bool
) -> None:
    options.look(directory, access)
    with options.changing(directory, access) as (catalog, journal):
        records = find_all(catalog, names, run)
        changed = set_pinned(catalog, records, journal, pinned=pinned)
    what = "pinned" if pinned else "unpinned"
    if as_json:
        output.print_json({what: [record.name for record in records], "changed": [record.name for record in changed]})
        return
    for record in records:
        output.print_line(f"{what}  {record.name}{'' if record in changed else ' (was so before)'}")
