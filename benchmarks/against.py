"""What this build costs beside an earlier one: the same loop under both, in processes that take turns.

Run it with ``make bench-against REV=9ac1a4a``: any commit or tag. Medians are printed, and the ratio of this build to
that one. The save is of a few bytes, so that what remains is bookkeeping: records, aliases, retirement.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from trees import REPOSITORY, checked_out

GOALS = {"observe, not due (us)": "<= 1 us", "a save, wall (ms)": "<= 1.05", "a save, CPU (ms)": "<= 1.05"}

LOOP = """
import json, random, sys, tempfile, time

from checkpointer import CheckpointManager, EverySteps, KeepBest, KeepLast, Policy


class Bytes:
    name, extension = "bytes", ".ckpt"

    def write(self, state, stream):
        stream.write(b"x")

    def read(self, stream, *, weights_only, map_location):
        return {}

    def refused(self, state):
        return {}


with tempfile.TemporaryDirectory(dir=sys.argv[1]) as folder:
    metrics = {"loss": 1.0}
    with CheckpointManager(folder + "/quiet", Policy(EverySteps(10**9), [KeepLast(1)]), state=dict) as manager:
        start = time.perf_counter()
        for step in range(1, 200_001):
            manager.observe(metrics, step, 0, epoch_end=False)
        quiet = (time.perf_counter() - start) / 200_000
    random.seed(0)
    policy = Policy(EverySteps(1), [KeepBest(3, "loss", mode="min"), KeepLast(2)], last="link", best="link")
    with CheckpointManager(folder + "/saves", policy, state=dict, format=Bytes()) as manager:
        for step in range(1, 331):
            if step == 31:
                start, cpu = time.perf_counter(), time.process_time()
            manager.observe({"loss": random.random()}, step, 0, epoch_end=False)
        print(json.dumps([quiet * 1e6, (time.perf_counter() - start) / 0.3, (time.process_time() - cpu) / 0.3]))
"""


def measured(tree: Path, folder: str) -> list[float]:
    """Return what the loop costs with the code of a tree."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", LOOP, folder]
    run = subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True, check=True)
    values: list[float] = json.loads(run.stdout)
    return values


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("revision", help="the commit to compare with")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where the checkpoints go")
    options = parser.parse_args()
    with checked_out(options.revision) as earlier:
        runs = [
            (measured(earlier, options.folder), measured(REPOSITORY, options.folder)) for _ in range(options.rounds)
        ]
    print(f"{'':24}{options.revision[:9]:>10}{'this':>10}{'ratio':>8}  goal")
    for number, (what, goal) in enumerate(GOALS.items()):
        before, now = (statistics.median(run[side][number] for run in runs) for side in (0, 1))
        print(f"{what:24}{before:10.3f}{now:10.3f}{now / before:8.3f}  {goal}")


if __name__ == "__main__":
    main()
