"""``checkpointer sweep``: clear away what dead writers left."""

from __future__ import annotations

import attrs

from checkpointer.cli import options, output
from checkpointer.sweeping import sweep


def sweep_command(
    directory: options.Directory,
    storage_options: options.StorageOptions = None,
    key_env: options.KeyEnv = None,
    key_file: options.KeyFile = None,
    as_json: options.Json = False,
) -> None:
    """Remove unfinished writes of processes that are provably dead, and finish what they had begun.

    What a live process, or one on another machine less than a day ago, is writing is not touched.
    """
    key = options.key_of(key_env, key_file)
    options.look(directory, storage_options, key_env, key_file)
    with options.writing(directory, storage_options) as (storage, owner):
        swept = sweep(storage, owner, key)
    if as_json:
        output.print_json(attrs.asdict(swept))
        return
    for name in swept.finished:
        output.print_line(f"finished  {name}")
    for name in swept.left:
        output.print_line(f"left      {name}: its writer lives, or is on another machine")
    output.print_line(
        f"{swept.staged} unfinished writes removed, {len(swept.finished)} finished, {len(swept.left)} left"
    )
