"""The table that benchmarks print: what we take, what stands beside us, and the ratio."""

from __future__ import annotations

from collections.abc import Sequence

Row = tuple[str, str, str, str, str]

HEAD: Row = ("measure", "ours", "beside it", "takes", "ratio")


def compared(what: str, ours: float, peer: str, theirs: float, *, unit: str, goal: str, scale: float = 1) -> Row:
    """Return the row of two durations (seconds), shown times ``scale`` in ``unit``."""
    ratio = f"{ours / theirs:.2f} x" + (f" (goal {goal})" if goal else "")
    return what, f"{ours * scale:.3f} {unit}", peer, f"{theirs * scale:.3f} {unit}", ratio


def show(rows: Sequence[Sequence[str]], head: Sequence[str] = HEAD) -> None:
    """Print rows under their head."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
