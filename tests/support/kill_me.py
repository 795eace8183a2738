"""A little training that `test_kill.py` kills: its state is a counter, and it prints each step it was acknowledged."""

from __future__ import annotations

import sys
from typing import Any

from checkpointer import CheckpointManager, EverySteps, KeepBest, Listener, Policy, Record
from support.plain_format import PlainFormat


class Acknowledged(Listener):
    """In the background a save is acknowledged by this call."""

    def on_saved(self, record: Record) -> None:
        print("saved", record.step, flush=True)


def main() -> None:
    """Train on until killed."""
    state: dict[str, Any] = {"step": 0, "filler": "x" * 100_000}
    policy = Policy(EverySteps(1), [KeepBest(2, "loss", mode="min")], last=sys.argv[2], best="link")  # type: ignore[arg-type]
    background = sys.argv[3:] == ["background"]
    manager = CheckpointManager(
        sys.argv[1],
        policy,
        state=lambda: state,
        format=PlainFormat(),
        listeners=[Acknowledged()] if background else [],
        background="wait" if background else None,
    )
    restored = manager.restore()
    if restored is not None:
        state = restored.state
    print("restored", state["step"], flush=True)
    while True:
        step = state["step"] + 1
        state["step"] = step
        if manager.observe({"loss": (step * 7919) % 101}, step=step, epoch=0, epoch_end=False) and not background:
            print("saved", step, flush=True)


if __name__ == "__main__":
    main()
