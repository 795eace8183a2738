"""Tables of plain columns, quick for ten thousand rows. If a table is too wide, one column is folded."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Final

from rich.cells import cell_len

from checkpointer._display import one_line

__all__ = ["Cell", "Table", "width"]

Cell = str | Sequence[tuple[str, str]]
"""Text, or lines of it, each with a style."""

_GAP: Final = "  "
_LEAST: Final = 20
"""Least width of the folded column."""
_WIDE: Final = 200
"""Width of output to a file or another program: a name is not folded there."""
_STYLES: Final = {"bold": "1", "dim": "2", "green": "32", "red": "1;31"}


def width() -> int:
    """Return how many columns there are to print in."""
    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        return shutil.get_terminal_size().columns
    return _WIDE


class Table:
    """Rows under a head.

    Args:
        head: The columns' names; all empty for no head.
        right: Names of the columns that are aligned to the right.
        folded: Number of the column that is folded if there is no room.
    """

    def __init__(self, *head: str, right: Sequence[str] = (), folded: int = -1) -> None:
        self._head = [one_line(name) for name in head]
        self._right = [name in right for name in head]
        self._folded = folded % len(head)
        self._rows: list[list[Sequence[tuple[str, str]]]] = []

    def add(self, *cells: Cell) -> None:
        """Add a row; what is in it may come from storage."""
        lines = (((cell, ""),) if isinstance(cell, str) else cell for cell in cells)
        self._rows.append([[(one_line(text), style) for text, style in cell] for cell in lines])

    def __len__(self) -> int:
        return len(self._rows)

    def print(self) -> None:
        """Print it on stdout, in colours if that is a terminal."""
        widths = self._widths()
        is_coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        head: list[Sequence[tuple[str, str]]] = [[(name, "bold")] for name in self._head]
        for row in [*([head] if any(self._head) else []), *self._rows]:
            for line in self._lines(row, widths):
                sys.stdout.write(self._text(line, widths, is_coloured=is_coloured) + "\n")

    def _widths(self) -> list[int]:
        widths = [cell_len(name) for name in self._head]
        for row in self._rows:
            for number, cell in enumerate(row):
                for text, _ in cell:
                    widths[number] = max(widths[number], len(text) if text.isascii() else cell_len(text))
        others = sum(widths) - widths[self._folded] + len(_GAP) * (len(widths) - 1)
        widths[self._folded] = min(widths[self._folded], max(width() - others, _LEAST))
        return widths

    def _lines(self, row: Sequence[Sequence[tuple[str, str]]], widths: Sequence[int]) -> list[list[tuple[str, str]]]:
        """Return a row as lines that each have one line of every cell."""
        cells = [list(cell) for cell in row]
        size = widths[self._folded]
        cells[self._folded] = [
            (part, style)
            for text, style in cells[self._folded]
            for part in (textwrap.wrap(text, size, break_on_hyphens=False) if len(text) > size else [text])
        ]
        count = max(map(len, cells))
        return [[cell[number] if number < len(cell) else ("", "") for cell in cells] for number in range(count)]

    def _text(self, line: Sequence[tuple[str, str]], widths: Sequence[int], *, is_coloured: bool) -> str:
        parts = []
        for (text, style), size, is_right in zip(line, widths, self._right, strict=True):
            room = " " * (size - (len(text) if text.isascii() else cell_len(text)))
            shown = f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if is_coloured and style and text else text
            parts.append(room + shown if is_right else shown + room)
        return _GAP.join(parts).rstrip()
