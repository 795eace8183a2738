"""A little training with a mirror that `test_mirror_kill.py` kills; its state is a counter and some filler."""

from __future__ import annotations

import sys

from checkpointer import CheckpointManager, EverySteps, KeepBest, KeepLast, Mirror, Policy
from support.plain_format import PlainFormat

POLICY = Policy(EverySteps(1), [KeepLast(2)], last="link")
MIRROR_KEEP: list[KeepBest | KeepLast] = [KeepBest(2, "loss", mode="min"), KeepLast(2)]


def manager(here: str, there: str, state: dict[str, object]) -> CheckpointManager:
    """Return the training's manager."""
    return CheckpointManager(
        here, POLICY, state=lambda: state, format=PlainFormat(), mirror=Mirror(there, keep=MIRROR_KEEP)
    )


def main() -> None:
    """Train on until killed."""
    state: dict[str, object] = {"step": 0, "filler": "x" * 100_000}
    training = manager(sys.argv[1], sys.argv[2], state)
    restored = training.restore()
    step = 0 if restored is None else restored.step
    print("restored", step, flush=True)
    while True:
        step += 1
        state["step"] = step
        if training.observe({"loss": (step * 7919) % 101}, step=step, epoch=0, epoch_end=False):
            print("saved", step, flush=True)


if __name__ == "__main__":
    main()
