"""A little training on S3 that `test_kill_s3.py` kills: a child of this process, which has imported everything once."""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

from checkpointer import CheckpointManager, EverySteps, KeepBest, KeepLast, Policy
from support.plain_format import PlainFormat
from support.s3_tools import LargeFormat


def policy_of(last: str | None) -> Policy:
    """Return the policy of this training, which saves each step."""
    keep = [KeepBest(2, "loss", mode="min"), *([] if last else [KeepLast(1)])]
    return Policy(EverySteps(1), keep, last=last)  # type: ignore[arg-type]


def say(*words: object) -> None:
    """Print a line in one piece: a kill does not cut it."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def train(url: str, options: dict[str, Any], last: str | None, size: int) -> None:
    """Train on until killed."""
    say("pid", os.getpid())
    state: dict[str, Any] = {"step": 0, "filler": "x" * 100_000}
    payload = LargeFormat(size) if size else PlainFormat()
    manager = CheckpointManager(url, policy_of(last), state=lambda: state, format=payload, storage_options=options)
    restored = manager.restore()
    if restored is not None:
        state = restored.state
    say("restored", state["step"])
    while True:
        step = state["step"] + 1
        state["step"] = step
        if manager.observe({"loss": (step * 7919) % 101}, step=step, epoch=0, epoch_end=False):
            say("saved", step)


def main() -> None:
    """Fork a training per line of stdin, and say when it has ended."""
    # Once, and not by each child.
    importlib.import_module("s3fs")
    for line in sys.stdin:
        child = os.fork()
        if not child:
            try:
                train(**json.loads(line))
            finally:
                os._exit(1)
        os.waitpid(child, 0)
        say("ended")


if __name__ == "__main__":
    main()
