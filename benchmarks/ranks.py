"""What several processes pay: for agreeing, in a training of 5 ms steps, and for a save of shards.

Run it with ``make bench-ranks``; with ``BEFORE=v0.1.0`` it measures saves and restores of that commit, too. Blocks of
steps with and without a trigger are interleaved in the same processes; a step sleeps and then reduces a gradient, as
DDP does. The overhead is the median over pairs of blocks. Saves of sharded state are interleaved too; what counts is
how long the loop of the slowest rank is blocked. `shards` measures the whole save and restore.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from shards import measured, rows
from support.together import together
from table import Row, show
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from trees import REPOSITORY, checked_out

from checkpointer import DistributedManager, EverySeconds, EverySteps, KeepLast, Policy

STEP_S = 0.005
BLOCK = 100
PAIRS = 9

SHARDS_MB = 256
"""MB of shards on each rank."""
TENSORS = 16
SAVES = 5


def overheads(rank: int) -> dict[str, tuple[float, float]]:
    """Return what a step takes without, and how much more it takes with each way to agree: seconds."""
    gradient = torch.zeros(10_000)
    never = DistributedManager(None, Policy(EverySteps(10**9), [KeepLast(1)]), state=dict)
    timed = DistributedManager(None, Policy(EverySeconds(10**9), [KeepLast(1)]), state=dict)
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
    exchanges = timed._agreement.num_exchanges / (BLOCK * (PAIRS + 1))
    found["time trigger, by its own account"] = found["time trigger"][0], exchanges * timed._agreement.cost_s
    return found


def blocked(rank: int, folder: str) -> dict[str, float]:
    """Return how long each way to save shards blocks the loop of the slowest rank: seconds, the median of several."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    size = SHARDS_MB * 1_000_000 // 4 // TENSORS
    state = {f"w{i}": DTensor.from_local(torch.rand(size), mesh, [Shard(0)], run_check=False) for i in range(TENSORS)}
    buffers = [torch.empty(size) for _ in range(TENSORS)]
    policy = Policy(EverySteps(1), [KeepLast(1)])
    how: Any = {"state": lambda: state, "format": "dcp"}
    behind = DistributedManager(f"{folder}/behind", policy, background="wait", **how)
    in_loop = DistributedManager(f"{folder}/in-loop", policy, **how)
    group = dist.new_group(backend="gloo")
    stager = DefaultStager(StagingOptions(False, False, False, False))
    futures: list[Any] = []

    def copy(_: int) -> None:
        for buffer, tensor in zip(buffers, state.values(), strict=True):
            buffer.copy_(tensor.to_local())

    def save_by_dcp(step: int) -> None:
        answer = async_save(state, checkpoint_id=f"{folder}/dcp-{step}", process_group=group, async_stager=stager)
        futures.append(getattr(answer, "upload_completion", answer))

    def finish() -> None:
        behind.wait()
        while futures:
            futures.pop().result()
        dist.barrier()
        if rank == 0:
            for left in Path(folder).glob("dcp-*"):
                shutil.rmtree(left)

    ways: dict[str, Callable[[int], Any]] = {
        "a copy into warm buffers": copy,
        "torch-checkpointer, background": lambda step: behind.observe({}, step, 0, epoch_end=False),
        "DCP async_save": save_by_dcp,
        "torch-checkpointer, in the loop": lambda step: in_loop.observe({}, step, 0, epoch_end=False),
    }
    took: dict[str, list[float]] = {name: [] for name in ways}
    for step in range(1, SAVES + 2):
        for name, save in ways.items():
            dist.barrier()
            start = time.perf_counter()
            save(step)
            all_took: list[float] = [0.0] * dist.get_world_size()
            dist.all_gather_object(all_took, time.perf_counter() - start)
            finish()
            took[name].append(max(all_took))
    behind.close()
    in_loop.close()
    return {name: statistics.median(times[1:]) for name, times in took.items()}  # The first one warms.


def saved_and_restored(before: str | None, sizes: Sequence[int]) -> list[Row]:
    """Return the rows of `shards`, of this build and an earlier one, which take turns."""
    table: list[Row] = []
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        builds = {"this build": REPOSITORY}
        if before:
            builds[before[:9]] = stack.enter_context(checked_out(before))
        for size in sizes:
            found = {name: measured(tree, size, SHARDS_MB, SAVES, folder) for name, tree in builds.items()}
            table += rows(found, size, SHARDS_MB)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", metavar="REV", help="a commit or tag that is measured beside this build")
    parser.add_argument("--only", choices=["shards"], help="leave out what agreement costs")
    parser.add_argument("--sizes", type=int, nargs="*", default=[2, 4], help="numbers of ranks")
    options = parser.parse_args()
    rows = [] if options.only else agreed(options.sizes)
    show([*rows, *saved_and_restored(options.before, options.sizes)])


def agreed(sizes: Sequence[int]) -> list[Row]:
    """Return what agreement costs, and how long saves block the loop."""
    rows: list[Row] = []
    for size in sizes:
        for name, (without, more) in together(size, overheads)[0].items():
            goal = " (goal <= 1 %)" if name.startswith("time trigger") else ""
            rows.append(
                (
                    f"{size} ranks, {name}",
                    f"{more * 1e6:+.0f} us",
                    "a step",
                    f"{without * 1e3:.2f} ms",
                    f"{more / without:+.2%}{goal}",
                )
            )
        with tempfile.TemporaryDirectory() as folder:
            (copy, copied), *others = together(size, blocked, folder)[0].items()
        what = f"{size} ranks, loop blocked by {SHARDS_MB} MB of shards each"
        rows += [
            (f"{what}: {name}", f"{s:.3f} s", copy, f"{copied:.3f} s", f"{s / copied:.2f} x") for name, s in others
        ]
    return rows


if __name__ == "__main__":
    main()
