"""One of several trainings that race for the same names, see `test_races.py`. It prints its acknowledged saves."""

from __future__ import annotations

import json
import sys
import warnings

import attrs

from checkpointer import CheckpointManager, EverySteps, KeepAll, Policy
from checkpointer.errors import NameTakenError, SaveError
from checkpointer.storage.retry import Retry
from support.plain_format import PlainFormat


def main() -> None:
    """Wait for a line on stdin, and save the same steps as the other trainings."""
    url, options, writer, steps = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    warnings.simplefilter("ignore")
    state = {"writer": writer, "filler": "x" * 5000}
    policy = Policy(EverySteps(1), [KeepAll()], name="{step}")
    # Without versions a taken name is not replaced by another one, so a training can lose the race.
    policy = attrs.evolve(policy, name=attrs.evolve(policy.name, version_counter=sys.argv[5] == "versions"))
    remote = "://" in url
    manager = CheckpointManager(
        url,
        policy,
        state=lambda: state,
        format=PlainFormat(),
        storage_options={**options, "retry": Retry(deadline_s=60)} if remote else None,
    )
    print("ready", flush=True)
    sys.stdin.readline()
    for step in range(1, steps + 1):
        try:
            if decision := manager.observe({}, step=step, epoch=0, epoch_end=False):
                print("saved", getattr(decision, "name", ""), flush=True)
        except SaveError as error:
            taken = isinstance(error.__cause__, NameTakenError)
            print("failed", "NameTakenError" if taken else repr(error.__cause__ or error), flush=True)
    manager.close()


if __name__ == "__main__":
    main()
