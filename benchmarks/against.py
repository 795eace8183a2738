"""What this build costs beside an earlier one: the same program with the code of both, in processes that take turns.

Run it with ``make bench-against REV=9ac1a4a``: any commit or tag. A ratio over 1 says that this build takes more. The
turns are short, so that what else the machine does hits both. The save of one byte is bookkeeping alone: records,
aliases, retirement.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import attrs
from trees import REPOSITORY, checked_out

PROGRAM = Path(__file__).with_name("turns.py")


@attrs.frozen
class Row:
    """One column of a measure's turns."""

    measure: str
    column: int
    what: str
    unit: str
    scale: float


ROWS = (
    Row("observe", 0, "observe, not due", "us", 1e6),
    Row("loop", 0, "a step of a Loop, not due", "us", 1e6),
    Row("loop_hour", 0, "the same, with an hour too", "us", 1e6),
    Row("save", 0, "a save of 1 byte", "ms", 1e3),
    Row("save", 1, "the same, CPU", "ms", 1e3),
    Row("save_large", 0, "a save of 512 MB", "s", 1),
    Row("save_large", 1, "the same, CPU", "s", 1),
    Row("memory", 0, "peak of memory in a process that does it", "MB", 1),
    Row("open_many", 0, "open 10 000 records", "s", 1),
    Row("open_many", 1, "the same, CPU", "s", 1),
)
ROUNDS = {"observe": 4000, "loop": 4000, "loop_hour": 4000, "save": 200, "save_large": 15, "memory": 0, "open_many": 20}
"""Turns of each build after the first one, which warms up. If there is only that one, it counts."""


class Side:
    """The process of one build."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def turn(self) -> list[float]:
        """Let the process take a turn, and return what that took."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            msg = f"{' '.join(map(str, self._process.args[-2:]))} ended"  # type: ignore[index]
            raise RuntimeError(msg)
        values: list[float] = json.loads(line)
        return values


@contextmanager
def side(tree: Path, measure: str, folder: str) -> Iterator[Side]:
    """Start a process with the code of a tree."""
    path = os.pathsep.join(map(str, (tree, tree / "adapters")))
    # Not by its path: then the folder of this build's benchmarks would be on the path of the earlier build.
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM.read_text(), measure, folder]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, cwd=tree, stdin=pipe, stdout=pipe, text=True) as process:
        yield Side(process)
        assert process.stdin is not None
        process.stdin.close()


def measured(trees: tuple[Path, Path], measure: str, folder: str, rounds: int) -> list[tuple[list[float], list[float]]]:
    """Return what each turn took, before and now."""
    with ExitStack() as stack:
        before, now = (stack.enter_context(side(tree, measure, folder)) for tree in trees)
        turns = [(before.turn(), now.turn())]
        for number in range(rounds):
            if number % 2:
                turns.append((before.turn(), now.turn()))
            else:
                later = now.turn()
                turns.append((before.turn(), later))
        return turns[1:] or turns


def shown(row: Row, turns: list[tuple[list[float], list[float]]]) -> str:
    """Return the row as markdown."""
    before, now = ([turn[side][row.column] * row.scale for turn in turns] for side in (0, 1))
    pairs = zip(before, now, strict=True)
    ratios = statistics.median(after / earlier for earlier, after in pairs) if all(before) else math.nan
    least = f"{min(before):.3f} | {min(now):.3f} | {min(now) / min(before) if all(before) else math.nan:.3f}"
    median = f"{statistics.median(before):.3f} | {statistics.median(now):.3f} | {ratios:.3f}"
    return f"| {row.what} ({row.unit}) | {least} | {median} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("revision", help="the commit to compare with")
    parser.add_argument("--rounds", type=float, default=1.0, help="turns, as a multiple of the usual number")
    parser.add_argument("--only", nargs="*", choices=ROUNDS, metavar="NAME", help=f"of {', '.join(ROUNDS)}")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where the checkpoints go")
    options = parser.parse_args()
    least = f"{options.revision[:9]}, least | this, least | ratio"
    print(f"| | {least} | {options.revision[:9]}, median | this, median | median of the ratios |")
    print("|---|---|---|---|---|---|---|")
    with checked_out(options.revision) as earlier:
        for measure in options.only or ROUNDS:
            rounds = math.ceil(ROUNDS[measure] * options.rounds)
            turns = measured((earlier, REPOSITORY), measure, options.folder, rounds)
            for row in (row for row in ROWS if row.measure == measure):
                print(shown(row, turns), flush=True)


if __name__ == "__main__":
    main()
