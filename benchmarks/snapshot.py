"""How long a save in the background blocks the loop: ``python benchmarks/snapshot.py``.

Three states of as many tensors as named are saved. Beside each save stand a ``copy_`` per tensor into warm buffers and
a ``clone`` per tensor. With ``--before FOLDER`` (the path of another checkout) the build in that folder saves the same
state too, in a process of its own. All sides take turns; the medians are printed. The files go to the working
directory's disk, or with ``--in-memory`` nowhere.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from table import show

from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy

STATES = {"64 x 16 MB": (64, 1 << 22), "2 000 x 400 kB": (2_000, 100_000), "20 000 x 4 kB": (20_000, 1_000)}
"""Number of tensors, and elements in each (four bytes)."""
HEAD = ("state", "who", "blocked", "beside a copy")
Row = tuple[str, str, str, str]


def state_of(name: str) -> dict[str, torch.Tensor]:
    """Return a state by its name in `STATES`."""
    count, size = STATES[name]
    return {f"layers.{i}.weight": torch.randn(size) for i in range(count)}


class Ours:
    """A manager of the build that this process imports."""

    def __init__(self, where: str | None, state: dict[str, torch.Tensor]) -> None:
        policy = Policy(EverySteps(1), [KeepLast(1)])
        self._manager = CheckpointManager(where, policy, state=lambda: state, background="wait")
        self._step = 0

    def save(self) -> float:
        """Save once; return how long the loop was blocked (seconds)."""
        self._step += 1
        start = time.perf_counter()
        self._manager.observe({}, step=self._step, epoch=0, epoch_end=False)
        took = time.perf_counter() - start
        self._manager.wait()
        return took


class Before:
    """Another build, in a process of its own."""

    def __init__(self, source: str, name: str, where: str | None) -> None:
        command = [sys.executable, __file__, "--serve", name, where or ""]
        path = os.pathsep.join([str(Path(source).resolve()), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": path}
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def save(self) -> float:
        """Save once; return how long its loop was blocked (seconds)."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("save\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


def serve(name: str, where: str | None) -> None:
    """Save at each line of the input, and print how long the loop was blocked."""
    ours = Ours(where, state_of(name))
    for _ in sys.stdin:
        print(ours.save(), flush=True)


def timed(call: Callable[[], object]) -> float:
    """Return how long a call takes (seconds)."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def rows(name: str, before: str | None, folder: str | None, repeats: int) -> list[Row]:
    """Measure all sides for one state."""
    state = state_of(name)
    buffers = {key: torch.empty_like(tensor) for key, tensor in state.items()}

    def copy() -> None:
        for key, tensor in state.items():
            buffers[key].copy_(tensor)

    sides: dict[str, Callable[[], float]] = {
        "copy into warm buffers": lambda: timed(copy),
        "clone": lambda: timed(lambda: {key: tensor.clone() for key, tensor in state.items()}),
        "torch-checkpointer": Ours(folder and f"{folder}/ours", state).save,
    }
    other = Before(before, name, folder and f"{folder}/before") if before else None
    if other is not None:
        sides["before"] = other.save
    took: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(repeats + 2):
        for side in list(sides)[:: 1 if number % 2 else -1]:
            seconds = sides[side]()
            if number > 1:  # The first rounds warm up.
                took[side].append(seconds)
    if other is not None:
        other.close()
    medians = {side: statistics.median(times) for side, times in took.items()}
    base = medians["copy into warm buffers"]
    return [(name, side, f"{t * 1e3:.1f} ms", f"{t / base:.2f} x") for side, t in medians.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", metavar="FOLDER", help="another checkout to measure beside this one")
    parser.add_argument("--only", choices=STATES, help="measure one state")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--in-memory", action="store_true", help="write no files")
    parser.add_argument("--serve", nargs=2, metavar=("STATE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve[0], arguments.serve[1] or None)
        return
    table: list[Row] = []
    for name in [arguments.only] if arguments.only else STATES:
        with tempfile.TemporaryDirectory(dir=".") as folder:
            where = None if arguments.in_memory else folder
            table += rows(name, arguments.before, where, arguments.repeats)
    show(table, HEAD)


if __name__ == "__main__":
    main()
