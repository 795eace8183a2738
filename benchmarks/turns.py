"""One side of `against.py`: a process with the code of one commit. Each line that it reads asks for one turn."""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from checkpointer_torch import Loop

from checkpointer import AnyOf, CheckpointManager, EverySeconds, EverySteps, KeepAll, KeepBest, KeepLast, Policy

Turns = Generator[tuple[float, ...], None, None]
QUIET_STEPS = 2000
"""So few that many turns are not interrupted by other programs."""
SAVES = 10
MEGABYTES = 512
RECORDS = 10_000
NEVER = 10**9


class Bytes:
    """A format whose payloads have one byte, so that a save is bookkeeping alone."""

    name, extension = "bytes", ".ckpt"

    def write(self, state: Any, stream: Any) -> None:
        """Write one byte."""
        stream.write(b"x")

    def read(self, stream: Any, *, weights_only: bool, map_location: Any) -> Any:
        """Return nothing."""
        return {}

    def refused(self, state: Any) -> dict[str, str]:
        """Refuse nothing."""
        return {}


def observe(folder: str) -> Turns:
    """Report when nothing is due (s)."""
    metrics = {"loss": torch.tensor(0.5)}
    manager = CheckpointManager(None, Policy(EverySteps(NEVER), [KeepLast(1)]), state=dict)
    first = 1
    while True:
        start = time.perf_counter()
        for step in range(first, first + QUIET_STEPS):
            manager.observe(metrics, step, 0, epoch_end=False)
        yield ((time.perf_counter() - start) / QUIET_STEPS,)
        first += QUIET_STEPS


def _loop(folder: str, policy: Policy) -> Turns:
    metrics = {"loss": torch.tensor(0.5)}
    with Loop(folder, policy, model=torch.nn.Linear(2, 2)) as loop:
        batches = loop.batches(range(NEVER))
        while True:
            start = time.perf_counter()
            for _ in itertools.islice(batches, QUIET_STEPS):
                loop.step(metrics)
            yield ((time.perf_counter() - start) / QUIET_STEPS,)


def loop(folder: str) -> Turns:
    """A step of a `Loop` when nothing is due (s)."""
    return _loop(folder, Policy(EverySteps(NEVER), [KeepLast(1)]))


def loop_hour(folder: str) -> Turns:
    """The same with a trigger that counts time (s)."""
    return _loop(folder, Policy(AnyOf(EverySteps(NEVER), EverySeconds(3600)), [KeepLast(1)]))


def save(folder: str) -> Turns:
    """A save of one byte: records, aliases, retirement (s, and s of CPU)."""
    random.seed(0)
    policy = Policy(EverySteps(1), [KeepBest(3, "loss", mode="min"), KeepLast(2)], last="link", best="link")
    bytes_: Any = Bytes()
    with CheckpointManager(folder, policy, state=dict, format=bytes_) as manager:
        first = 1
        while True:
            start, cpu = time.perf_counter(), time.process_time()
            for step in range(first, first + SAVES):
                manager.observe({"loss": random.random()}, step, 0, epoch_end=False)
            yield (time.perf_counter() - start) / SAVES, (time.process_time() - cpu) / SAVES
            first += SAVES


def save_large(folder: str) -> Turns:
    """A save of 512 MB that replaces the one before (s, and s of CPU)."""
    with _large(folder) as manager:
        for step in itertools.count(1):
            os.sync()
            start, cpu = time.perf_counter(), time.process_time()
            manager.observe({}, step, 0, epoch_end=False)
            yield time.perf_counter() - start, time.process_time() - cpu


def memory(folder: str) -> Turns:
    """The peak of memory in a save of 512 MB (MB)."""
    with _large(folder) as manager:
        # Not ru_maxrss: a child inherits its parent's.
        Path("/proc/self/clear_refs").write_text("5")
        manager.observe({}, 1, 0, epoch_end=False)
        yield (int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024,)


def _large(folder: str) -> CheckpointManager:
    floats = MEGABYTES * 2**20 // 4
    state = {"a": torch.randn(floats // 2), "b": torch.randn(floats // 4), "c": [torch.randn(floats // 4)]}
    policy = Policy(EverySteps(1), [KeepLast(1)])
    with CheckpointManager(f"{folder}-small", policy, state=lambda: {"a": torch.ones(8)}) as small:
        small.observe({}, 1, 0)  # So that the modules are imported.
    return CheckpointManager(folder, policy, state=lambda: state)


def open_many(folder: str) -> Turns:
    """Open a directory of 10 000 records (s)."""
    policy = Policy(EverySteps(1), [KeepAll()])
    bytes_: Any = Bytes()
    with CheckpointManager(folder, policy, state=dict, format=bytes_) as manager:
        manager.observe({"val_loss": 1.0, "acc": 0.5}, 1, 0, epoch_end=False)
        name = manager.records[0].name
    records = Path(folder, ".checkpointer", "records")
    first = (records / f"{name}.json").read_text()
    for step in range(2, RECORDS + 1):
        entry = json.loads(first)
        copy = entry["record"]["name"] = name.replace("step=1.", f"step={step}.")
        entry["record"] |= {"step": step, "serial": step, "token": f"{step:032x}", "time": float(step)}
        (records / f"{copy}.json").write_text(json.dumps(entry))
        Path(folder, copy).write_bytes(b"x")
    time.sleep(1)  # The index leaves out what has changed in its own second.
    Path(folder, ".checkpointer", "index.json").unlink()
    with CheckpointManager(folder, policy, state=dict) as manager:
        assert len(manager.records) == RECORDS
    while True:
        gc.collect()
        start, cpu = time.perf_counter(), time.process_time()
        manager = CheckpointManager(folder, policy)
        took = time.perf_counter() - start, time.process_time() - cpu
        assert len(manager.records) == RECORDS
        yield took


MEASURES: dict[str, Callable[[str], Turns]] = {
    measure.__name__: measure for measure in (observe, loop, loop_hour, save, save_large, memory, open_many)
}


def main() -> None:
    """Take turns until there are no more lines."""
    torch.set_num_threads(1)
    measure = MEASURES[sys.argv[1]]
    with tempfile.TemporaryDirectory(dir=sys.argv[2]) as folder, closing(measure(f"{folder}/checkpoints")) as turns:
        for _ in sys.stdin:
            print(json.dumps(next(turns)), flush=True)


if __name__ == "__main__":
    main()
