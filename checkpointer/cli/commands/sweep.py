"""``checkpointer sweep``: clear away what dead writers left."""

from __future__ import annotations

from typing import Annotated

import attrs
import typer

from checkpointer.cli import options, output
from checkpointer.tools.sweep import sweep


def sweep_command(
    directory: options.Directory,
    force: Annotated[
        bool, typer.Option("--force", help="Also of processes on other machines: you know that they have ended.")
    ] = False,
    storage_options: options.StorageOptions = None,
    key_env: options.KeyEnv = None,
    key_file: options.KeyFile = None,
    as_json: options.Json = False,
) -> None:
    """Remove unfinished writes of processes that are provably dead, and finish what they had begun.

    What a live process, or one on another machine less than a day ago, is writing is not touched. With --force
    processes on other machines count as ended: their marks, which keep prune and copy out, are removed.
    """
    key = options.key_of(key_env, key_file)
    options.look(directory, storage_options, key_env, key_file)
    with options.writing(directory, storage_options) as (storage, owner):
        swept = sweep(storage, owner, key, force=force)
    if as_json:
        output.print_json(attrs.asdict(swept))
        return
    for name in swept.finished:
        output.print_line(f"finished  {name}")
    for name in swept.left:
        output.print_line(f"left      {name}: its writer is running, or is on another machine")
    for writer in swept.writers:
        output.print_line(f"writing   {writer}")
    output.print_line(
        f"{swept.staged} unfinished writes removed, {len(swept.finished)} finished, {len(swept.left)} left"
    )
