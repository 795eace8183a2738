"""The training time that a background save costs, by ``benchmarks/training.py``, as rows of the long table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec

from perf.rows import OURS, Row, judged, named
from perf.setup import Setup

BEFORE = "the build before"
"""What that module calls it."""
MEGABYTES = 512
LEFT_OUT = ("DCP async_save, process",)
"""Sides that the table leaves out, because it would take too long."""
Answers = Mapping[str, list[dict[str, float]]]
"""What each side took in each round."""


def is_there() -> bool:
    """Return whether the module is."""
    return find_spec("training") is not None


def lost(setup: Setup) -> list[Row]:
    """Rows for small and large steps, and for one and two training threads."""
    training = import_module("training")
    before = setup.before
    names = [OURS, *([BEFORE] if before else []), *(name for name in training.PEERS if name not in LEFT_OUT)]
    size = min(setup.megabytes, MEGABYTES)
    with training.sides_of(names, size, str(setup.trees[before]) if before else "") as sides:
        found = training.measured(sides, setup.repeats, training.SETTINGS)
        why = {side.name: side.why for side in sides if side.why}
        floors = {side.name: side.at_least for side in sides}
    rows: list[Row] = []
    for setting, answers in found.items():
        gigabytes = size * 1.048576 / 1000
        least = {name: floor(setting[1]) / gigabytes for name, floor in floors.items()}
        rows += _rows(setting, answers, why=why, gigabytes=gigabytes, least=least)
    return [row._replace(who=row.who.replace(BEFORE, before or "")) for row in rows]


def _rows(
    setting: tuple[str, int],
    answers: Answers,
    *,
    why: Mapping[str, str],
    gigabytes: float,
    least: Mapping[str, float],
) -> list[Row]:
    kind, threads = setting
    lost_s = {who: _median(taken, "lost") / gigabytes for who, taken in answers.items() if taken}
    beside = BEFORE if BEFORE in lost_s else OURS
    best = min((took for who, took in lost_s.items() if who not in (OURS, BEFORE)), default=float("inf"))
    rows = []
    for who, taken in answers.items():
        if not taken:
            rows.append(Row("", who, f"not run: {why.get(who, '')[:100]}"))
            continue
        ratio = lost_s[who] / lost_s[beside]
        speed = f"speed {_median(taken, 'share'):.0%} for {_median(taken, 'took'):.2f} s"
        takes = f"{lost_s[who]:.3f} s/GB (at least {least[who]:.3f}; {speed})"
        goal = _goal(ratio, lost_s[who], best) if (who, beside) == (OURS, BEFORE) else ""
        rows.append(Row("", who, takes, beside, f"{ratio:.2f} x", goal))
    return named(f"training lost to a save, {kind} steps, {threads} thread{'s' * (threads > 1)}", rows)


def _goal(ratio: float, took: float, best: float) -> str:
    return f"{judged(ratio, 0.5)}; less than each peer: {'reached' if took < best else 'missed'}"


def _median(taken: list[dict[str, float]], what: str) -> float:
    return statistics.median(each[what] for each in taken)


MEASURES: dict[str, Callable[[Setup], list[Row]]] = {"training": lost} if is_there() else {}
