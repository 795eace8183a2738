"""``checkpointer prune``: remove what a policy does not keep."""

from __future__ import annotations

from typing import Annotated

import typer

from checkpointer._display import size_text
from checkpointer.cli import options, output
from checkpointer.commit.journal import Journal
from checkpointer.tools.catalog import look_at
from checkpointer.tools.prune import Pruning, plan_pruning, prune

PolicyFile = Annotated[
    str, typer.Option("--policy", "-p", metavar="FILE", help="What to keep, as YAML.", show_default=False)
]


def prune_command(
    directory: options.Directory,
    policy: PolicyFile,
    apply: Annotated[bool, typer.Option("--apply", help="Remove it. Without this it is only shown.")] = False,
    abandoned: Annotated[
        bool, typer.Option("--abandoned", help="Also what the run left behind when it went back to an earlier step.")
    ] = False,
    run: options.Run = None,
    storage_options: options.StorageOptions = None,
    key_env: options.KeyEnv = None,
    key_file: options.KeyFile = None,
    as_json: options.Json = False,
) -> None:
    """Show what a policy would remove of a run, and why; with --apply remove it.

    Other runs, files that no record names, what is pinned and what an alias names are never removed.
    """
    chosen, key = options.read_policy(policy), options.key_of(key_env, key_file)
    options.look(directory, storage_options, key_env, key_file)
    with options.writing(directory, storage_options) as (storage, owner):
        catalog = look_at(storage, key)
        pruning = plan_pruning(chosen, catalog.manifest(run), catalog.aliases, abandoned=abandoned)
        gone = prune(catalog, pruning, Journal(storage, owner, key)) if apply else ()
    if catalog.signed and key is None:
        output.say(f"{catalog.signed} checkpoints are signed: without the key this believes unsigned records as well")
    names = [record.name for record in gone]
    if as_json:
        data = {"kept": dict(pruning.kept), "going": dict(pruning.going), "bytes": pruning.bytes, "removed": names}
        output.print_json(data)
    else:
        _print(pruning, len(names) if apply else None)
    output.leave_if(output.say_damaged(catalog) or (apply and len(names) < len(pruning.going)))


def _print(pruning: Pruning, removed: int | None) -> None:
    for name, why in pruning.kept.items():
        output.print_line(f"keep  {name}: {why}")
    for name, why in pruning.going.items():
        output.print_line(f"{'drop' if removed is None else 'gone'}  {name}: {why}")
    size, count = size_text(pruning.bytes), len(pruning.going)
    if removed is None:
        output.print_line(
            f"{count} would go ({size}), {len(pruning.kept)} stay; nothing was changed, --apply removes them"
        )
    else:
        output.print_line(f"{removed} of {count} gone ({size}), {len(pruning.kept)} stay")
