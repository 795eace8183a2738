"""How commands speak: results on stdout, all else on stderr, and what storage says without its control characters."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from checkpointer._display import one_line
from checkpointer.cli.tables import width
from checkpointer.commit.missing import few_names
from checkpointer.tools.catalog import Catalog

FOUND_BAD = 1
"""Exit code: it was done, and something bad was found."""


def say(text: str) -> None:
    """Print to stderr what is not a result."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(Text(one_line(text)))


def print_line(text: str) -> None:
    """Print one line of a result, whatever the width, as a script would read it."""
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


def say_damaged(catalog: Catalog) -> bool:
    """Say which records cannot be read, have no payload or are half-way; return whether something is damaged."""
    for error in catalog.damaged.values():
        say(f"damaged: {error}")
    if catalog.missing:
        count = len(catalog.missing)
        what = f"{few_names(catalog.missing)} ({count} checkpoint{'s' if count > 1 else ''}, not counted)"
        say(f"payload gone, or of another size than its record says: {what}; 'checkpointer verify' says more")
    half_way = [entry.record.name for entry in catalog.unfinished]
    if half_way:
        say(f"half-way: {', '.join(half_way)}; a live writer goes on with it, 'checkpointer sweep' ends a dead one's")
    return bool(catalog.damaged)


def leave_if(bad: bool) -> None:
    """End with the exit code that says something bad was found, if so."""
    if bad:
        raise typer.Exit(FOUND_BAD)


class Bar:
    """Shows on a terminal's stderr how many of so many bytes are done."""

    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar = bar
        self._task = task

    def expect(self, total: int) -> None:
        """Say how many bytes there will be."""
        self._bar.update(self._task, total=total)

    def __call__(self, count: int) -> None:
        """Say that so many more are done."""
        self._bar.update(self._task, advance=count)


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Bar]:
    """Show how many of so many bytes are done, on a terminal; yields the function that counts more."""
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True)
    # A bar that was started ends with a newline, even if it is disabled.
    with bar if console.is_terminal else contextlib.nullcontext():
        yield Bar(bar, bar.add_task(what, total=total))
