"""What saves and restores of shards cost beside ``torch.distributed.checkpoint``, with this build or another one.

`measured` runs this file in a process whose ``PYTHONPATH`` has the code of a build. In that process the two sides take
turns, each in the same ranks: a save until it is durable, beside DCP's ``FileSystemWriter`` and an fsync of its folder;
a verified restore, beside DCP's load, which verifies nothing. What counts is the slowest rank, and the median.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from support.together import together
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from checkpointer import DistributedManager, EverySteps, KeepLast, Policy

TENSORS = 16
SAVE, SAVE_BESIDE, RESTORE, RESTORE_BESIDE, READ = "save", "save by DCP", "restore", "load by DCP", "MB read in a save"


def measured(tree: Path, size: int, megabytes: int, rounds: int, folder: str) -> dict[str, float]:
    """Return seconds, and MB that all ranks read in a save, by what was measured with the code of a tree."""
    path = os.pathsep.join([str(tree), str(Path(__file__).resolve().parent.parent / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__, *map(str, (size, megabytes, rounds)), folder]
    run = subprocess.run(command, env=environment, cwd=tree, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


class Turns:
    """The durations of the slowest rank, of acts that all ranks do together."""

    def __init__(self) -> None:
        self.took: dict[str, list[float]] = {}

    def note(self, name: str, value: float, combine: Callable[[list[float]], float]) -> None:
        everywhere: list[float] = [0.0] * dist.get_world_size()
        dist.all_gather_object(everywhere, value)
        self.took.setdefault(name, []).append(combine(everywhere))

    def __call__(self, acts: Mapping[str, Callable[[], object]], number: int) -> None:
        """Time the acts, in the opposite order each second time."""
        for name in [*acts] if number % 2 else [*acts][::-1]:
            dist.barrier()
            start, read = time.perf_counter(), _bytes_read()
            acts[name]()
            self.note(name, time.perf_counter() - start, max)
            if name == SAVE:
                self.note(READ, (_bytes_read() - read) / 1e6, sum)


def in_turns(rank: int, megabytes: int, rounds: int, folder: str) -> dict[str, float]:
    """Save and restore in turns with DCP."""
    warnings.simplefilter("ignore")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    count = megabytes * 1_000_000 // 4 // TENSORS
    state = {f"w{i}": DTensor.from_local(torch.rand(count), mesh, [Shard(0)], run_check=False) for i in range(TENSORS)}
    turns = Turns()

    def save_by_dcp() -> None:
        save(state, storage_writer=FileSystemWriter(f"{folder}/dcp"))
        if rank == 0:
            handle = os.open(f"{folder}/dcp", os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)

    def load_by_dcp() -> None:
        load(state, storage_reader=FileSystemReader(f"{folder}/dcp"))

    policy = Policy(EverySteps(1), [KeepLast(2)])
    for step in range(1, rounds + 2):
        manager = DistributedManager(f"{folder}/ours", policy, state=lambda: state, format="dcp")
        observe = functools.partial(manager.observe, {}, step, 0, epoch_end=False)
        turns({SAVE: observe, SAVE_BESIDE: save_by_dcp}, step)
        turns({RESTORE: manager.restore, RESTORE_BESIDE: load_by_dcp}, step)
        manager.close()
        dist.barrier()
        if rank == 0:
            for each in ("ours", "dcp"):
                shutil.rmtree(f"{folder}/{each}")
        dist.barrier()
    return {name: statistics.median(times[1:]) for name, times in turns.took.items()}  # The first round warms.


def _bytes_read() -> int:
    text = Path("/proc/self/io").read_text()
    return int(text.split("rchar:")[1].split()[0])


def rows(found: Mapping[str, Mapping[str, float]], size: int, megabytes: int) -> list[tuple[str, str, str, str, str]]:
    """Return the rows of the table: each build beside DCP in the same run."""
    what = f"{size} ranks, {megabytes} MB each"
    goals = {SAVE: "1.1", RESTORE: "1.3"}
    table = []
    for ours, beside, text in ((SAVE, SAVE_BESIDE, "save, durable"), (RESTORE, RESTORE_BESIDE, "verified restore")):
        for build, times in found.items():
            goal = f" (goal <= {goals[ours]} x)" if build == "this build" else ""
            ratio = f"{times[ours] / times[beside]:.2f} x{goal}"
            table.append((f"{what}, {text}: {build}", f"{times[ours]:.3f} s", beside, f"{times[beside]:.3f} s", ratio))
    for build, times in found.items():
        table.append((f"{what}, bytes read in a save: {build}", f"{times[READ]:.1f} MB", "", "", ""))
    return table


if __name__ == "__main__":
    ranks, mb, turns_each = map(int, sys.argv[1:4])
    with tempfile.TemporaryDirectory(dir=sys.argv[4]) as place:
        results = together(ranks, in_turns, mb, turns_each, place)
    print(json.dumps(results[0]) if isinstance(results[0], dict) else repr(results), flush=True)
