"""Numbers as people read them, such as sizes and ages, and small tables for a notebook."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from html import escape
from typing import Final

_UNITS: Final = ("kB", "MB", "GB", "TB", "PB")
_AGES: Final = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"))
_SHARDS: Final = re.compile(r"__(\d+)_\d+\.distcp")
_CELL: Final = 'style="text-align: left; vertical-align: top; padding: 2px 10px 2px 0"'
_ERRNO: Final = re.compile(r"\[Errno -?\d+\] ")


def size_text(size: float) -> str:
    """Return a number of bytes in decimal units.

    >>> size_text(999), size_text(2_430_000), size_text(-3_000_000_000)
    ('999 B', '2.4 MB', '-3.0 GB')
    """
    if abs(size) < 1000:
        return f"{size:.0f} B"
    for unit in _UNITS:
        size /= 1000
        if abs(size) < 999.95 or unit == _UNITS[-1]:
            break
    return f"{size:.1f} {unit}"


def age_text(seconds: float) -> str:
    """Return how long something took or how old it is.

    >>> age_text(12), age_text(7200), age_text(200_000)
    ('12 s', '2 h', '2 d')
    """
    for length, unit in _AGES:
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0.0):.0f} s"


def shard_text(file: str) -> str:
    """Return the name of a file of shards with the rank that wrote it: DCP puts its number into the name.

    >>> shard_text("__3_0.distcp"), shard_text(".metadata")
    ('__3_0.distcp (the shards of rank 3)', '.metadata')
    """
    match = _SHARDS.fullmatch(file)
    return f"{file} (the shards of rank {match[1]})" if match else file


def count_text(count: int, noun: str) -> str:
    """Return a count with its noun.

    >>> count_text(1, "epoch"), count_text(2, "epoch")
    ('1 epoch', '2 epochs')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def every_text(interval: int, noun: str) -> str:
    """Return an interval.

    >>> every_text(1, "epoch"), every_text(2, "epoch")
    ('every epoch', 'every 2 epochs')
    """
    return f"every {noun}" if interval == 1 else f"every {count_text(interval, noun)}"


def number_text(value: float, digits: int = 6) -> str:
    """Return a metric's value in so many digits at most.

    >>> number_text(0.062312345), number_text(3.0), number_text(float("nan"))
    ('0.0623123', '3', 'nan')
    """
    return f"{value:.{digits}g}" if math.isfinite(value) else str(value)


def one_line(text: str) -> str:
    r"""Return text from storage as it may be shown: no control character moves the cursor or colours the screen.

    >>> one_line("a\x1b[31mb")
    'a?[31mb'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join("?" if _drives(char) else char for char in text)


def without_errno(text: str) -> str:
    """Return the text of an error without the system's number of it.

    Example:
        >>> without_errno("[Errno 28] No space left on device")
        'No space left on device'
    """
    return _ERRNO.sub("", text)


def escaped_json(text: str) -> str:
    r"""Return JSON text in which each character that a terminal or browser acts on is an escape, newlines excepted.

    >>> escaped_json('"a\u202eb\x7f"')
    '"a\\u202eb\\u007f"'
    """
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    # Such characters stand only within strings. A character beyond 16 bits takes two escapes.
    return "".join(char if char == "\n" or not _drives(char) else _escape(char) for char in text)


def _escape(char: str) -> str:
    units = char.encode("utf-16-be", errors="surrogatepass")
    return "".join(f"\\u{high:02x}{low:02x}" for high, low in zip(units[::2], units[1::2], strict=True))


def _drives(char: str) -> bool:
    """Return whether a character controls, formats or separates, or is half of one."""
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def some_of(names: Sequence[str], most: int = 5) -> str:
    """Return the first names of many, and how many more there are.

    >>> some_of(["a", "b", "c"], 2), some_of([])
    ('a, b and 1 more', 'none')
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more or "none"


def table_html(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """Return a table; its colours are the notebook's.

    >>> table_html(["name"], [["<b>"]]).count("&lt;b&gt;")
    1
    """
    title = f"<caption {_CELL}>{escape(caption)}</caption>" if caption else ""
    heads = "".join(f"<th {_CELL}>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td {_CELL}>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{title}<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def lines_html(title: str, lines: Iterable[tuple[str, str]]) -> str:
    """Return a title and what there is to say, a line each; an empty one is left out."""
    body = "".join(
        f"<tr><th {_CELL}>{escape(name)}</th><td {_CELL}>{_cell(value)}</td></tr>" for name, value in lines if value
    )
    return f"<div><code>{escape(title)}</code><table><tbody>{body}</tbody></table></div>"


def _cell(text: str) -> str:
    return "<br>".join(escape(line) for line in text.split("\n"))
