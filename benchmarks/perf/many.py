"""What a quiet step, a save and opening cost when very many checkpoints are on record."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from directories import records_of

from checkpointer import Budget, CheckpointManager, EverySteps, KeepAll, KeepBest, Policy
from perf.rows import Row
from perf.setup import Setup
from perf.sides import folder

KEPT: dict[str, list[Any]] = {
    "everything": [KeepAll()],
    "two ranked rules and a budget": [
        KeepBest(10**9, "val_loss", mode="min"),
        KeepBest(3, "acc", mode="max"),
        Budget(bytes=10**12),
    ],
}
"""Rules under which very many live."""
GOALS_MS = {1000: 5, 10_000: 100}


def with_many(setup: Setup) -> list[Row]:
    """A row for each number of checkpoints and each set of rules."""
    rows = []
    for kept in KEPT:
        taken = {count: _measured(count, Policy(EverySteps(1), KEPT[kept])) for count in setup.checkpoints}
        base = taken[setup.checkpoints[0]][1]
        for count, (quiet, saved, opened) in taken.items():
            text = f"step {quiet * 1e6:.2f} us, save {saved * 1e3:.1f} ms of CPU, open {opened:.2f} s"
            more = (saved - base) * 1e3
            most = GOALS_MS.get(count)
            goal = f"<= +{most} ms: {'reached' if more <= most else 'missed'}" if most else ""
            beside = f"{setup.checkpoints[0]} checkpoints"
            rows.append(
                Row(f"with {count} checkpoints, {kept}", "torch-checkpointer", text, beside, f"{more:+.1f} ms", goal)
            )
    return rows


def _measured(count: int, policy: Policy) -> tuple[float, float, float]:
    """Return seconds of a quiet step, of the processor's time for a save, and of opening, with so many on record."""
    with folder() as path:
        _prepare(path, count, policy)
        start = time.perf_counter()
        CheckpointManager(path, policy, run="bench")
        opened = time.perf_counter() - start
        with CheckpointManager(path, policy, state=dict, run="bench") as manager:
            saved = statistics.median([_save(manager, count, n) for n in range(1, 23)])
        with CheckpointManager(path, Policy(EverySteps(10**9), [KeepAll()]), state=dict, run="bench") as manager:
            manager.observe({}, count + 30, 0, epoch_end=False)
            start = time.perf_counter()
            for n in range(count + 31, count + 10_031):
                manager.observe({}, n, 0, epoch_end=False)
            quiet = time.perf_counter() - start
    return quiet / 10_000, saved, opened


def _prepare(path: str, count: int, policy: Policy) -> None:
    records = Path(path, ".checkpointer", "records")
    records.mkdir(parents=True)
    for name, record in records_of(count):
        (records / f"{name}.json").write_bytes(record)
        Path(path, name).touch()
    CheckpointManager(path, policy, state=dict, run="bench").close()  # Writes the index.


def _save(manager: CheckpointManager, count: int, n: int) -> float:
    metrics = {"val_loss": 1 / (n % 5 + 1), "acc": n}
    start = time.thread_time()  # What the disk takes is the same however many there are.
    manager.observe(metrics, count + n, 0, epoch_end=False)
    return time.thread_time() - start
