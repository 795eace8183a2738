"""How many functions of this library lie between a call of the manager and the operation in which it ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from torch.serialization import _load  # What `torch.load` calls for a file that it has opened.

import checkpointer
from checkpointer import CheckpointManager, EverySteps, KeepAll, Policy

PACKAGE = str(Path(checkpointer.__file__).parent)


def hops(act: Callable[[], object], is_end: Callable[[FrameType, str, Any], bool]) -> list[str]:
    """Return the named functions of the library on the stack when ``act`` comes to its end for the last time."""
    stack: list[str] = []

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        if not is_end(frame, event, arg):
            return
        stack.clear()
        caller: FrameType | None = frame
        while caller is not None:
            code = caller.f_code
            if code.co_filename.startswith(PACKAGE) and not code.co_name.startswith("<"):
                stack.insert(0, code.co_name)
            caller = caller.f_back

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        act()
    finally:
        sys.setprofile(before)
    return stack


def test_a_save_and_a_restore_pass_few_functions(tmp_path: Path) -> None:
    """From `observe` to the last fsync of the record, and from `restore` to the reader of torch."""
    manager = CheckpointManager(tmp_path, Policy(EverySteps(1), [KeepAll()]), state=lambda: {"w": 1})
    save = hops(lambda: manager.observe({}, 1, 0), lambda _, event, call: event == "c_call" and call is os.fsync)
    load = hops(manager.restore, lambda frame, event, _: event == "call" and frame.f_code is _load.__code__)
    manager.close()
    assert ("observe", "restore") == (save[0], load[0])
    assert len(save) <= 8, save
    assert len(load) <= 7, load
