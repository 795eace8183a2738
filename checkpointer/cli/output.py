"""How commands speak: results on stdout, all else on stderr, and what storage says without its control characters."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
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
from rich.table import Table
from rich.text import Text

from checkpointer.inspecting import Catalog
from checkpointer.wording import one_line

_WIDE = 200
"""Columns of output that goes to a file or another program."""

FOUND_BAD = 1
"""Exit code: it was done, and something bad was found."""


def out() -> Console:
    """Return what prints results; where nobody said how wide it is, names are not folded to fit a terminal's 80."""
    console = Console(highlight=False)
    known = console.is_terminal or "COLUMNS" in os.environ
    return console if known else Console(highlight=False, width=_WIDE)


def say(text: str) -> None:
    """Say something that is no result."""
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


def plain_table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """Return a table without lines; nothing in it is cut off."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False, show_edge=False)
    for column in columns:
        is_right = column in right
        table.add_column(
            cell(column, "bold"), justify="right" if is_right else "left", no_wrap=is_right, overflow="fold"
        )
    return table


def cell(text: str, style: str = "") -> Text:
    """Return text from storage as a cell."""
    return Text(one_line(text), style=style)


def say_damaged(catalog: Catalog) -> bool:
    """Say which records cannot be read, and what is half-way; return whether something is damaged."""
    for error in catalog.damaged.values():
        say(f"damaged: {error}")
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
    """Show how many of so many bytes are done, on a terminal; yields what to tell of more."""
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield Bar(bar, bar.add_task(what, total=total))
