"""``checkpointer sweep``: remove what dead writers left."""

from __future__ import annotations

from typing import Annotated

import attrs

from checkpointer._display import count_text
from checkpointer.cli import options, output
from checkpointer.tools.sweep import sweep


def sweep_command(
    directory: options.Directory,
    access: options.Access,
    force: Annotated[bool, options.option("--force", "Count processes on other machines as ended too.")] = False,
    as_json: options.Json = False,
) -> None:
    """Finish or remove what ended processes have left unfinished.

    It does not touch the files of a running process. It does not touch files that a process on another machine wrote
    less than a day ago, unless you pass --force. --force counts processes on other machines as ended, and removes
    their marks, which block prune and copy.

    Example: checkpointer sweep runs/digits
    """
    key = access.key
    options.look(directory, access, begun=True)
    with options.writing(directory, access) as (storage, owner):
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
    removed = count_text(swept.staged, "unfinished write")
    output.print_line(f"{removed} removed, {len(swept.finished)} finished, {len(swept.left)} left")
