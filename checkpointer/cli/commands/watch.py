"""``checkpointer watch``: follow a training that runs elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import attrs

from checkpointer.cli import options, output
from checkpointer.tools.watch import Watched, lines_of, watch


def watch_command(
    directory: options.Directory,
    access: options.Access,
    once: Annotated[bool, options.option("--once", "Print once, and exit.")] = False,
    every: Annotated[float, options.option("--every SECONDS", "How often to look.", min=0.1)] = 5.0,
    run: options.Run = None,
    as_json: options.Json = False,
) -> None:
    """Show the state of a training in another process: last step, running save, next save, mirror, disk.

    It changes nothing. The training writes its state every 15 seconds, so what you see may be 15 seconds old. Watch
    ends when the training ends. Exits with 0 if the training is alive, with 1 if it has ended or its machine is silent.

    Example: checkpointer watch runs/digits --once
    """
    storage, key = options.open_place(directory, access), access.key
    while True:
        now = time.time()
        seen = watch(storage, now, key, run=run)
        is_alive = any(one.is_alive for one in seen)
        if as_json:
            output.print_json([_as_data(one) for one in seen])
        else:
            _print(seen, now, redraws=not once)
        if once or not output.flush() or not is_alive:
            output.leave_if(not is_alive)
            return
        time.sleep(every)


def _print(seen: tuple[Watched, ...], now: float, *, redraws: bool) -> None:
    if redraws and sys.stdout.isatty():
        output.write("\x1b[H\x1b[2J")
    output.print_line(f"{seen[0].place} at {time.strftime('%H:%M:%S', time.localtime(now))}")
    for one in seen:
        output.print_table(["", ""], [([(name, "bold")], text) for name, text in lines_of(one, now)])


def _as_data(seen: Watched) -> dict[str, Any]:
    newest = seen.newest
    data = attrs.asdict(seen, filter=lambda field, value: field.name not in ("newest", "status"))
    status = (
        None if seen.status is None else attrs.asdict(seen.status, filter=lambda field, value: value != float("inf"))
    )
    return data | {"alive": seen.is_alive, "status": status, "newest": newest.to_dict() if newest is not None else None}
