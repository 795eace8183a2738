"""What a `Loop` costs per step when nothing is due, beside the same loop without it."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time

import torch
from checkpointer_torch import Loop
from table import Row, compared, show

from checkpointer import AnyOf, EverySeconds, EverySteps, KeepLast, Policy

STEPS = 100_000
REPEATS = 7


def bare() -> float:
    """Return the seconds per step of a loop that does nothing."""
    start = time.perf_counter()
    for _ in iter(range(STEPS)):
        pass
    return (time.perf_counter() - start) / STEPS


def ours(loop: Loop, metrics: dict[str, torch.Tensor]) -> float:
    """Return the seconds per step, all that `batches` and `step` do included."""
    for _ in loop.epochs():
        start = time.perf_counter()
        for _ in loop.batches(range(STEPS)):
            loop.step(metrics)
        return (time.perf_counter() - start) / STEPS
    raise AssertionError


def rows() -> list[Row]:
    """Return what is measured, medians of interleaved runs."""
    found = []
    policies = {
        "every n steps": Policy(EverySteps(10**9), [KeepLast(1)]),
        "and every hour": Policy(AnyOf(EverySteps(10**9), EverySeconds(3600)), [KeepLast(1)]),
    }
    metrics = {"loss": torch.tensor(0.5)}
    for name, policy in policies.items():
        with tempfile.TemporaryDirectory() as folder:
            left, right = [], []
            for number in range(REPEATS):
                with Loop(f"{folder}/{number}", policy, model=torch.nn.Linear(2, 2)) as loop:
                    gc.collect()
                    left.append(ours(loop, metrics))
                    right.append(bare())
        raw = statistics.median(right)
        found.append(
            compared(f"step, {name}", statistics.median(left), "bare loop", raw, scale=1e6, unit="us", goal="<= 3 us")
        )
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    show(rows())
