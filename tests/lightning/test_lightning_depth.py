"""How deep the calls of a save are, from Lightning's hook to the last sync of the disk."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import checkpointer_lightning
import pytest
from checkpointer_lightning import CheckpointCallback, ModelCheckpoint
from tiny import fit, quiet

import checkpointer
from checkpointer import EverySteps, KeepLast, Policy

pytestmark = quiet

OURS = tuple(os.path.dirname(package.__file__ or "") for package in (checkpointer, checkpointer_lightning))


@pytest.mark.parametrize("kind", ["drop-in", "policy"])
def test_a_save_is_at_most_twelve_calls_deep(tmp_path: Path, kind: str) -> None:
    """A reader follows at most twelve functions from `on_train_batch_end` to the record's last sync."""
    saves: list[list[str]] = []

    def look(frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and function is os.fsync:
            stack = [call for call in traceback.extract_stack(frame) if call.filename.startswith(OURS)]
            calls = [f"{Path(call.filename).name} {call.name}" for call in stack]
            saves.extend([calls] if {"saver.py write", "journal.py put"} <= set(calls) else [])

    both: dict[str, Callable[[], Any]] = {
        "drop-in": lambda: ModelCheckpoint(tmp_path, every_n_train_steps=1),
        "policy": lambda: CheckpointCallback(tmp_path, Policy(EverySteps(1), [KeepLast(1)])),
    }
    sys.setprofile(look)
    try:
        fit(both[kind](), max_steps=1, limit_val_batches=0)
    finally:
        sys.setprofile(None)
    print(*saves[-1], sep="\n")
    assert "callback_base.py on_train_batch_end" == saves[-1][0]
    assert 12 >= len(saves[-1])
