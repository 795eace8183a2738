"""How values look in a notebook: small tables, with everything escaped that may come from storage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["lines_html", "table_html"]

_CELL = 'style="text-align: left; vertical-align: top; padding: 2px 10px 2px 0"'


def table_html(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """Return a table; its colours are the notebook's.

    Example:
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
