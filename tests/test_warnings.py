"""A warning shows the line of the user's program, not a line of this library or of the framework."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpointer_torch import Loop, load_weights
from torch import nn

from checkpointer import (
    CheckpointerWarning,
    CheckpointManager,
    EverySteps,
    KeepBest,
    KeepLast,
    Listener,
    Policy,
    Record,
)
from checkpointer.errors import failures_as_warnings

ROOT = Path(__file__).parents[1]
POLICY = Policy(EverySteps(1), [KeepLast(1)])


def manager(folder: Path, **kw: object) -> CheckpointManager:
    return CheckpointManager(folder / "run", POLICY, **{"state": lambda: {"w": 1}, **kw})  # type: ignore[arg-type]


class Failing(Listener):
    """A listener that fails at each checkpoint."""

    def on_saved(self, record: Record) -> None:
        raise RuntimeError("full")


def at_open(folder: Path) -> None:
    with CheckpointManager(folder / "run" / "below", POLICY, state=lambda: {"w": 1}) as one:
        one.observe({}, step=1, epoch=0)
    CheckpointManager(folder / "run").close()


def at_a_report(folder: Path) -> None:
    with manager(folder, listeners=[Failing()]) as one:
        one.observe({}, step=1, epoch=0)


def at_a_failed_save(folder: Path) -> None:
    with manager(folder, tolerate_failures=1) as one:
        shutil.rmtree(folder / "run")
        (folder / "run").write_text("a file")
        one.observe({}, step=1, epoch=0)
        (folder / "run").unlink()


def at_a_restore(folder: Path) -> None:
    with CheckpointManager(folder / "run", Policy(EverySteps(1), [KeepLast(2)]), state=lambda: {"w": 1}) as one:
        for step in (1, 2):
            one.observe({}, step=step, epoch=0)
        path = folder / "run" / one.records[-1].name
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        one.restore()


def at_the_end_of_a_with_block(folder: Path) -> None:
    def state() -> None:
        raise OSError("full")

    with manager(folder, state=state) as one:
        one.observe({}, step=0, epoch=0)
        raise KeyboardInterrupt


def within_a_context(_: Path) -> None:
    with failures_as_warnings("nothing was written"):
        raise OSError("full")


def in_a_loop(folder: Path) -> None:
    policy = Policy(EverySteps(10), [KeepBest(1, "v", mode="min")])
    with Loop(folder / "run", policy, model=nn.Linear(1, 1)) as loop:
        while loop.progress.step < 35:
            loop.step({"loss": 1.0})


def of_a_function(folder: Path) -> None:
    torch.save(nn.Linear(2, 1).state_dict(), folder / "a.pt")
    model = nn.Linear(2, 1)
    model.register_parameter("more", nn.Parameter(torch.zeros(1)))
    load_weights(model, folder / "a.pt", strict=False)


@pytest.mark.parametrize(
    "program",
    [
        at_open,
        at_a_report,
        at_a_failed_save,
        at_a_restore,
        at_the_end_of_a_with_block,
        within_a_context,
        in_a_loop,
        of_a_function,
    ],
)
def test_a_warning_shows_the_line_of_the_program(program: Callable[[Path], None], tmp_path: Path) -> None:
    """The file is that of the program, and the line is one of the function that called."""
    with contextlib.suppress(KeyboardInterrupt), pytest.warns(CheckpointerWarning) as seen:
        program(tmp_path)
    first = program.__code__.co_firstlineno
    lines = {line for *_, line in program.__code__.co_lines() if line}
    assert seen.list
    for warning in seen.list:
        assert __file__ == warning.filename, warning
        assert first <= warning.lineno <= max(lines), warning


def test_every_warning_of_the_packages_is_made_by_one_function() -> None:
    """It finds the line; a number of levels would be wrong as soon as a function moves."""
    sources = [*(ROOT / "checkpointer").rglob("*.py"), *(ROOT / "adapters").rglob("*.py")]
    made = [path.name for path in sources if re.search(r"warnings\.warn(_explicit)?\(", path.read_text("utf-8"))]
    assert ["errors.py"] == made
