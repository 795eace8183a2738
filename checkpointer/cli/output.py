"""What commands print: results on stdout, all else on stderr, and text from storage without control characters."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import typer

from checkpointer._display import count_text, escaped_json, one_line, size_text
from checkpointer._new_file import is_stream
from checkpointer.cli.streams import flush as flush
from checkpointer.cli.streams import print_line as print_line
from checkpointer.cli.streams import say as say
from checkpointer.cli.streams import write as write
from checkpointer.commit.deleted_by_others import few_names
from checkpointer.errors import NotFoundError
from checkpointer.records.codec import to_plain_float
from checkpointer.records.record import Record
from checkpointer.tools.catalog import Catalog

FOUND_BAD: Final = 1
"""Exit code: it was done, and something bad was found."""

Cell = str | Sequence[tuple[str, str]]
"""Text, or lines of it, each with a style."""
_Column = list[list[tuple[str, str]]]

_GAP: Final = "  "
_LEAST: Final = 20
"""Least width of a folded column."""
_WIDE: Final = 120
"""Width of output to a file or another program. Names are not broken there, so a line may be longer."""
_STYLES: Final = {"bold": "1", "dim": "2", "green": "32", "red": "1;31"}


def print_json(data: Any) -> None:
    """Print a result as JSON; NaN and infinities as text, as in records."""
    write(escaped_json(json.dumps(_plain(data), indent=2, ensure_ascii=False, allow_nan=False)) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return to_plain_float(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def print_written(out: str, text: str) -> None:
    """Print what was written to OUT; on stderr if OUT is stdout, whose reader gets the bytes alone."""
    (say if is_stdout(out) else print_line)(text)


def is_stdout(out: str) -> bool:
    """Return whether OUT is this process's stdout, as ``/dev/stdout`` is."""
    with contextlib.suppress(OSError, ValueError):
        return is_stream(out) and os.path.samestat(os.stat(out), os.fstat(1))
    return False


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


def would_remove(records: Sequence[Record], more: str = "") -> str:
    """Return the line of a command that removes nothing without ``--apply``."""
    if not records:
        return f"nothing to remove{more}"
    size = size_text(sum(record.size for record in records))
    them = "it" if len(records) == 1 else "them"
    return f"would remove {count_text(len(records), 'checkpoint')} ({size}){more}; --apply removes {them}"


def leave_if(bad: bool) -> None:
    """End with the exit code that says something bad was found, if so."""
    if bad:
        raise typer.Exit(FOUND_BAD)


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[..., object]]:
    """Show on a terminal's stderr how many of so many bytes are done.

    The function that is yielded counts more bytes as done; its keyword ``total`` replaces the number of all.
    """
    if not sys.stderr.isatty():
        yield lambda count=0, *, total=None: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    # On a terminal lines of stdout appear above the bar. Elsewhere they must not go to stderr.
    both = sys.stdout.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=both) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count=0, *, total=None: bar.update(task, advance=count, total=total)


def print_marked(mark: str, style: str, rest: str) -> None:
    """Print one line of a result that begins with a mark such as "BAD", in colour on a terminal."""
    write(_styled(mark, style if is_coloured() else "") + one_line(rest) + "\n")


def is_coloured() -> bool:
    """Return whether stdout is a terminal, and ``NO_COLOR`` does not forbid colours."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _styled(text: str, style: str) -> str:
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if style and text else text


# Tables of plain columns, quick for ten thousand rows: rich takes seconds for them


def width() -> int:
    """Return how many columns there are to print in."""
    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        return shutil.get_terminal_size().columns
    return _WIDE


def print_table(
    head: Sequence[str], rows: Iterable[Sequence[Cell]], *, right: Sequence[str] = (), folded: Sequence[int] = (-1,)
) -> None:
    """Print a table on stdout, in colours if that is a terminal.

    Args:
        head: The columns' names; all empty for no head.
        rows: The cells of each row; their text may come from storage.
        right: Names of the columns that are aligned to the right.
        folded: Numbers of the columns that are folded if there is no room, the widest one first.
    """
    shown = [_lines_of(column) for column in zip([[(name, "bold")] for name in head], *rows, strict=True)]
    wanted = [_width_of(column) for column in shown]
    widths = [*wanted]
    _narrow(widths, folded, width() - len(_GAP) * (len(widths) - 1))
    for at in (at for at in folded if widths[at] < wanted[at]):
        fold = _folder(widths[at])
        shown[at] = [[(part, style) for text, style in cell for part in fold(text)] for cell in shown[at]]
        widths[at] = max(widths[at], _width_of(shown[at]))
    columns = [
        _padded(column, size, right=name in right) for name, size, column in zip(head, widths, shown, strict=True)
    ]
    empty = [" " * size for size in widths]
    lines = []
    for cells in itertools.islice(zip(*columns, strict=True), 0 if any(head) else 1, None):
        for parts in itertools.zip_longest(*cells):
            line = [blank if part is None else part for part, blank in zip(parts, empty, strict=True)]
            lines.append(_GAP.join(line).rstrip() + "\n")
    write("".join(lines))


def _lines_of(cells: Sequence[Cell]) -> _Column:
    """Return the lines of each cell of a column, each with its style, without control characters."""
    split = ([(cell, "")] if isinstance(cell, str) else cell for cell in cells)
    return [[(one_line(text), style) for text, style in cell] for cell in split]


def _width_of(column: _Column) -> int:
    return max(_length(text) for cell in column for text, _ in cell)


def _padded(column: _Column, size: int, *, right: bool) -> list[list[str]]:
    """Return the lines of each cell of a column, all of one width, and in colours on a terminal."""
    has_colours = is_coloured()

    def padded(text: str, style: str) -> str:
        room, shown = " " * (size - _length(text)), _styled(text, style if has_colours else "")
        return room + shown if right else shown + room

    return [[padded(*line) for line in cell] for cell in column]


def _length(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def _narrow(widths: list[int], folded: Sequence[int], room: int) -> None:
    """Make the widest of the folded columns narrower until all columns fit, or each of them has the least width."""
    while sum(widths) > room:
        widest = max(folded, key=lambda column: widths[column])
        if widths[widest] <= _LEAST:
            return
        second = max((widths[column] for column in folded if widths[column] < widths[widest]), default=_LEAST)
        widths[widest] = max(second, _LEAST, min(widths[widest] - 1, widths[widest] - (sum(widths) - room)))


def _folder(size: int) -> Callable[[str], list[str]]:
    """Return what folds a text. A name is broken only on a terminal, because programs read it elsewhere."""
    breaks = sys.stdout.isatty() or "COLUMNS" in os.environ
    wrapper = textwrap.TextWrapper(size, break_long_words=breaks, break_on_hyphens=False)
    return lambda text: wrapper.wrap(text) if len(text) > size else [text]
