"""A small training with a mirror that `test_mirror_kill.py` kills."""

from __future__ import annotations

from typing import Any

from checkpointer import CheckpointManager, EverySteps, KeepBest, KeepLast, Mirror, Policy
from support.kill_me import new_state, train_until_killed
from support.plain_format import PlainFormat

POLICY = Policy(EverySteps(1), [KeepLast(2)], last="link")
MIRROR_KEEP: list[KeepBest | KeepLast] = [KeepBest(2, "loss", mode="min"), KeepLast(2)]


def manager(here: str, there: str, state: dict[str, Any]) -> CheckpointManager:
    """Return the training's manager."""
    return CheckpointManager(
        here, POLICY, state=lambda: state, format=PlainFormat(), mirror=Mirror(there, keep=MIRROR_KEEP)
    )


def main(here: str, there: str) -> None:
    state = new_state()
    train_until_killed(manager(here, there, state), state)
