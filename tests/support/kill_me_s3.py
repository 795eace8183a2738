"""Small trainings on S3 that `test_kill_s3.py` kills. They are children of this process, which imports everything."""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

from checkpointer import CheckpointManager, EverySteps, KeepBest, KeepLast, Policy
from support.kill_me import new_state, report, train_until_killed
from support.plain_format import PlainFormat
from support.s3_tools import LargeFormat


def policy_of(last: str | None) -> Policy:
    """Return the policy of this training, which saves each step."""
    keep = [KeepBest(2, "loss", mode="min"), *([] if last else [KeepLast(1)])]
    return Policy(EverySteps(1), keep, last=last)  # type: ignore[arg-type]


def train(url: str, options: dict[str, Any], last: str | None, size: int) -> None:
    """Train until killed."""
    report("pid", os.getpid())
    state, payload = new_state(), LargeFormat(size) if size else PlainFormat()
    manager = CheckpointManager(url, policy_of(last), state=lambda: state, format=payload, storage_options=options)
    train_until_killed(manager, state)


def main() -> None:
    """Fork a training for each line of stdin, and report when it has ended."""
    importlib.import_module("s3fs")  # Otherwise each child would import it.
    for line in sys.stdin:
        child = os.fork()
        if not child:
            try:
                train(**json.loads(line))
            finally:
                os._exit(1)
        os.waitpid(child, 0)
        report("ended")


if __name__ == "__main__":
    main()
