"""What several processes pay for agreeing: a training of 5 ms steps with and without a time trigger.

Run it with ``make bench-ranks``. Blocks of steps with and without are interleaved in the same processes; a step sleeps
and then reduces a gradient, as DDP does. The overhead is the median over pairs of blocks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from table import Row, show
from together import together

from checkpointer import EverySeconds, EverySteps, KeepLast, Policy, RankedManager

STEP_S = 0.005
BLOCK = 100
PAIRS = 9


def overheads(rank: int) -> dict[str, tuple[float, float]]:
    """Return what a step takes without, and how much more it takes with each way to agree: seconds."""
    gradient = torch.zeros(10_000)
    never = RankedManager(None, Policy(EverySteps(10**9), [KeepLast(1)]), state=dict)
    timed = RankedManager(None, Policy(EverySeconds(10**9), [KeepLast(1)]), state=dict)
    step = 0

    def block(report: Callable[[int], Any]) -> float:
        nonlocal step
        dist.barrier()
        start = time.perf_counter()
        for _ in range(BLOCK):
            step += 1
            time.sleep(STEP_S)
            dist.all_reduce(gradient)
            report(step)
        return (time.perf_counter() - start) / BLOCK

    def each_step(_: int) -> None:
        dist.broadcast_object_list([False], src=0)

    ways: dict[str, Callable[[int], Any]] = {
        "step trigger": lambda step: never.observe({}, step, 0, epoch_end=False),
        "time trigger": lambda step: timed.observe({}, step, 0, epoch_end=False),
        "a broadcast each step": each_step,
    }
    found = {}
    for name, report in ways.items():
        block(report)  # Warm.
        pairs = [(block(lambda _: None), block(report)) for _ in range(PAIRS)]
        found[name] = statistics.median(a for a, _ in pairs), statistics.median(b - a for a, b in pairs)
    return found


def main() -> None:
    rows: list[Row] = []
    for size in (2, 4):
        for name, (without, more) in together(size, overheads)[0].items():
            goal = " (goal <= 1 %)" if name == "time trigger" else ""
            rows.append(
                (
                    f"{size} ranks, {name}",
                    f"{more * 1e6:+.0f} us",
                    "a step",
                    f"{without * 1e3:.2f} ms",
                    f"{more / without:+.2%}{goal}",
                )
            )
    show(rows)


if __name__ == "__main__":
    main()
