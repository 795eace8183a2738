"""The rows of the long table, and the table as markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from perf.sides import Cost, Taken

OURS = "torch-checkpointer"


class Row(NamedTuple):
    """One line of the table, as text."""

    measure: str
    who: str
    takes: str
    beside: str = ""
    ratio: str = ""
    goal: str = ""


HEAD = Row("measure", "who", "takes", "beside", "ratio", "goal")


def wall(cost: Cost) -> float:
    """Return the time of a turn (seconds)."""
    return cost.wall_s


def cpu(cost: Cost) -> float:
    """Return the machine's CPU seconds of a turn."""
    return cost.cpu_s


def rows_of(
    measure: str,
    taken: Mapping[str, Taken],
    beside: str,
    *,
    goals: Mapping[str, float] | None = None,
    value: Callable[[Cost], float] = wall,
    unit: str = "s",
    scale: float = 1,
) -> list[Row]:
    """Return a row for each side, with the ratio of its median to that of ``beside``, and of its fastest turn.

    Args:
        measure: What was measured.
        taken: The turns of each side.
        beside: The side that the others are compared with.
        goals: The largest ratio that is wanted, by side.
        value: Which value of a turn counts.
        unit: The unit that is printed.
        scale: How many of it a second has.
    """
    base, fastest = taken[beside].median(value), min(map(value, taken[beside].costs))
    rows = []
    for who, side in taken.items():
        if not side.costs:
            rows.append(Row("", who, f"not run: {side.note}"))
            continue
        values = sorted(value(cost) * scale for cost in side.costs)
        ratio = side.median(value) / base if base else float("nan")  # Fewer CPU seconds than can be counted.
        takes = f"{side.median(value) * scale:.3f} {unit} ({values[0]:.3f} to {values[-1]:.3f})"
        goal = "" if goals is None or who not in goals else judged(ratio, goals[who])
        ratios = f"{ratio:.2f} x" + (f" ({values[0] / scale / fastest:.2f} x)" if fastest else "")
        rows.append(Row("", who, takes + (f"; {side.note}" if side.note else ""), beside, ratios, goal))
    return named(measure, rows)


def judged(ratio: float, most: float) -> str:
    """Return a goal, and whether it is reached."""
    return f"<= {most:g} x: {'reached' if ratio <= most else 'missed'}"


def named(measure: str, rows: Sequence[Row]) -> list[Row]:
    """Return the rows with the measure on the first."""
    return [row._replace(measure="" if number else measure) for number, row in enumerate(rows)]


def markdown(rows: Sequence[Row]) -> str:
    """Return the table, to paste into docs/performance.md."""
    lines = [HEAD, Row(*["---"] * len(HEAD)), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
