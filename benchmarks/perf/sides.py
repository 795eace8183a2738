"""Sides that take turns in one run: the time of each, and the processor's time that the whole machine spent."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

State = dict[str, torch.Tensor]

PATIENCE_S = 30
"""If the first round of a side takes longer, there is no second."""


class Cost(NamedTuple):
    """What one turn of a side took (seconds)."""

    wall_s: float
    cpu_s: float = float("nan")
    """Of the whole machine, so that the kernel's threads and other processes of a peer count."""


Side = Callable[[], Cost]


@dataclass(frozen=True)
class Taken:
    """All turns of one side, and what the reader must know about it."""

    costs: tuple[Cost, ...] = ()
    note: str = ""

    def median(self, value: Callable[[Cost], float]) -> float:
        """Return the median of one value of the turns."""
        return statistics.median(map(value, self.costs))


def interleaved(sides: Mapping[str, Side | str], repeats: int) -> dict[str, Taken]:
    """Run the sides in turns, and the first round to warm up.

    Args:
        sides: By name; a text instead of a side says why there is none.
        repeats: Rounds that count.

    Returns:
        What each took. A side that raises, or is very slow, is noted and not run again.
    """
    taken: dict[str, Taken] = {name: Taken(note=side) for name, side in sides.items() if isinstance(side, str)}
    costs: dict[str, list[Cost]] = {}
    for name, side in sides.items():
        if callable(side):
            taken[name] = _first(side)
            if not taken[name].note:
                costs[name] = []
    mixed = random.Random(0)  # What a side finds in memory depends on the side before it.
    for _ in range(repeats):
        for name in mixed.sample(list(costs), len(costs)):
            side = sides[name]
            assert callable(side)
            costs[name].append(side())
    counted = {name: Taken(tuple(found)) for name, found in costs.items()}
    return {name: counted.get(name, taken[name]) for name in sides}


def _first(side: Side) -> Taken:
    try:
        cost = side()
    except Exception as error:  # A peer may raise anything; the table says what.
        return Taken(note=f"{type(error).__name__}: {first_line(error)}")
    slow = cost.wall_s > PATIENCE_S
    return Taken((cost,) if slow else (), "one turn, because it is slow" if slow else "")


def first_line(error: BaseException) -> str:
    """Return the first line of a message, shortened."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0][:100]


def machine_cpu_s() -> float:
    """Return the seconds that all processors have worked since the machine started."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def cost_of(call: Callable[[], object]) -> Cost:
    """Return what a call takes, on a disk that has nothing left to write."""
    os.sync()
    cpu, start = machine_cpu_s(), time.perf_counter()
    call()
    took = time.perf_counter() - start
    return Cost(took, machine_cpu_s() - cpu)


def state_of(megabytes: float, tensors: int = 64) -> State:
    """Return a state of so many tensors."""
    return {f"layer{i}.weight": torch.randn(int(megabytes * 2**18) // tensors) for i in range(tensors)}


def touched(state: State) -> None:
    """Read one byte of each page."""
    for tensor in state.values():
        tensor.view(torch.uint8)[::4096].sum()


def made_durable(path: str) -> None:
    """Make a file, or a folder with all in it, durable."""
    inside = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in (*names, ".")]
    for each in inside or [path]:
        descriptor = os.open(each, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def drop(path: str) -> None:
    """Remove a file or folder, if it is there."""
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.exists(path):
        os.unlink(path)


@contextlib.contextmanager
def folder() -> Iterator[str]:
    """Return a folder on the disk of the working directory."""
    with tempfile.TemporaryDirectory(dir=".") as path:
        yield os.path.abspath(path)
