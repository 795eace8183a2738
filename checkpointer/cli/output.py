"""What commands print: results on stdout, all else on stderr, and text from storage without control characters."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import textwrap
from collections.abc import Iterator
from typing import Any, Protocol

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from checkpointer._display import count_text, one_line
from checkpointer.cli.tables import width
from checkpointer.commit.missing import few_names
from checkpointer.errors import NotFoundError
from checkpointer.records.record import Record
from checkpointer.tools.catalog import Catalog

FOUND_BAD = 1
"""Exit code: it was done, and something bad was found."""


def say(text: str) -> None:
    """Print a message to stderr; results go to stdout."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(Text(one_line(text)))


def print_line(text: str) -> None:
    """Print one line of a result, not folded to the width, for scripts."""
    sys.stdout.write(one_line(text) + "\n")


def print_json(data: Any) -> None:
    """Print a result as JSON; NaN and infinities as text, as in records."""
    sys.stdout.write(json.dumps(_plain(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def print_text(text: str) -> None:
    """Print a sentence of a result, folded to the terminal's width."""
    for line in textwrap.wrap(one_line(text), width(), break_on_hyphens=False):
        sys.stdout.write(line + "\n")


def print_path(catalog: Catalog, record: Record, *, as_json: bool) -> None:
    """Print where a checkpoint lies, and leave with 1 if a record is damaged: it may be that of a better one."""
    path = catalog.location(record.name)
    if as_json:
        print_json(record.to_dict() | {"path": path})
    else:
        print_line(path)
    leave_if(say_damaged(catalog))


def no_checkpoint(catalog: Catalog) -> NotFoundError:
    """Return the error of a directory in which no checkpoint counts, and say what is damaged."""
    say_damaged(catalog)
    return NotFoundError(f"{catalog.place} has no checkpoint that counts")


def say_damaged(catalog: Catalog) -> bool:
    """Report records that cannot be read, have no payload or are half-way; return whether one is damaged."""
    for error in catalog.damaged.values():
        say(f"damaged: {error}")
    if catalog.missing:
        what = f"{few_names(catalog.missing)} ({count_text(len(catalog.missing), 'checkpoint')}, not counted)"
        say(f"payload gone, or of another size than its record says: {what}; 'checkpointer verify' says more")
    half_way = [entry.record.name for entry in catalog.unfinished]
    if half_way:
        say(f"half-way: {', '.join(half_way)}; a running writer finishes it; if it ended, run 'checkpointer sweep'")
    return bool(catalog.damaged)


def leave_if(bad: bool) -> None:
    """End with the exit code that says something bad was found, if so."""
    if bad:
        raise typer.Exit(FOUND_BAD)


class Bar(Protocol):
    """Counts bytes on a progress bar."""

    def __call__(self, count: int = 0, *, total: int | None = None) -> None:
        """Count so many more bytes as done; ``total`` replaces the number that is expected."""


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Bar]:
    """Show on a terminal's stderr how many of so many bytes are done."""
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task(what, total=total)
    # A bar that was started ends with a newline, even if it is disabled.
    with bar if console.is_terminal else contextlib.nullcontext():
        yield lambda count=0, *, total=None: bar.update(task, advance=count, total=total)
