"""A small training that `test_kill.py` kills: its state is a counter, and it prints each acknowledged step."""

from __future__ import annotations

import os
from typing import Any, NoReturn

from checkpointer import CheckpointManager, EverySteps, KeepBest, Listener, Policy, Record
from support.plain_format import PlainFormat


def new_state() -> dict[str, Any]:
    """Return a state of 100 kB before its first step."""
    return {"step": 0, "filler": "x" * 100_000}


def report(*parts: object) -> None:
    """Print a line in one piece, so that a kill does not cut it."""
    os.write(1, (" ".join(map(str, parts)) + "\n").encode())


def train_until_killed(manager: CheckpointManager, state: dict[str, Any], *, reports: bool = True) -> NoReturn:
    """Restore, and then save each step; report each acknowledged one, unless a listener does."""
    if (restored := manager.restore()) is not None:
        state.update(restored.state)
    report("restored", state["step"])
    while True:
        step = state["step"] = state["step"] + 1
        if manager.observe({"loss": (step * 7919) % 101}, step=step, epoch=0, epoch_end=False) and reports:
            report("saved", step)


class Reporting(Listener):
    """Reports a save in the background, which this call acknowledges."""

    def on_saved(self, record: Record) -> None:
        report("saved", record.step)


def main(directory: str, last: Any, *how: str) -> None:
    state, background = new_state(), how == ("background",)
    manager = CheckpointManager(
        directory,
        Policy(EverySteps(1), [KeepBest(2, "loss", mode="min")], last=last, best="link"),
        state=lambda: state,
        format=PlainFormat(),
        listeners=[Reporting()] if background else [],
        background="wait" if background else None,
    )
    train_until_killed(manager, state, reports=not background)
