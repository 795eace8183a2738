"""Train on a machine that may be taken away: commit to its disk, copy to a bucket, resume on the next machine.

``--bucket`` takes any fsspec URL, such as ``s3://bucket/runs/digits`` or ``gs://...``. The driver reads the credentials
from its usual places. Without ``--bucket`` the copies stay in memory.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from checkpointer import CheckpointManager, EverySteps, KeepBest, KeepLast, Mirror, Policy
from checkpointer.policy.retention import Rule

POLICY = Policy(EverySteps(10), [KeepLast(1)], last="link")


def train(directory: Path, bucket: str, steps: int) -> None:
    torch.manual_seed(0)
    weights = torch.zeros(1000)
    keep: list[Rule] = [KeepBest(2, "loss", mode="min"), KeepLast(1)]
    with CheckpointManager(
        directory, POLICY, state=lambda: {"w": weights}, mirror=Mirror(bucket, keep=keep)
    ) as manager:
        restored = manager.restore()
        start = 0
        if restored is not None:
            weights, start = restored.state["w"], restored.step
        print(f"{'resumed from ' + restored.record.name if restored else 'started a new run'} on {directory.name}")
        for step in range(start + 1, steps + 1):
            weights += 0.1
            manager.observe({"loss": 1 / step}, step, epoch=0, epoch_end=False)
    print("on the local disk:", *[record.name for record in manager.records])
    print(manager.session.mirror_status)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bucket", default="memory://bucket/run")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder, "first-machine"), args.bucket, 20)
        shutil.rmtree(Path(folder, "first-machine"))
        train(Path(folder, "second-machine"), args.bucket, 40)


if __name__ == "__main__":
    main()
