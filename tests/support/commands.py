"""Runs the command line in this process, because importing torch again for each command would take seconds."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import attrs
import torch

from checkpointer import CheckpointManager, EverySteps, KeepBest, KeepLast, Policy
from checkpointer.cli.app import run

POLICY = Policy(EverySteps(1), [KeepBest(2, "loss", mode="min"), KeepLast(1)], last="link", best="copy")


@attrs.frozen
class Said:
    """The result of a command: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """Its stdout, parsed as JSON."""
        return json.loads(self.out)


def command(*argv: object, columns: int = 160) -> Said:
    """Run one command on a terminal of ``columns`` characters."""
    os.environ["COLUMNS"] = str(columns)
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([*map(str, argv)])
    out.seek(0)
    return Said(code, out.read(), err.getvalue())


def train(folder: Path, *losses: float, policy: Policy = POLICY, **kw: Any) -> Path:
    """Save a checkpoint for each loss, and return the folder."""
    state = {"model": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(3)}, "lr": 0.1}
    with CheckpointManager(folder, policy, state=lambda: state, **kw) as manager:
        for step, loss in enumerate(losses, start=1):
            state["model"]["w"] = torch.arange(6.0).reshape(2, 3) * loss  # type: ignore[index]
            manager.observe({"loss": loss, "acc": 1 - loss}, step=step * 10, epoch=step - 1)
    return folder


def snapshot(folder: Path) -> dict[str, bytes | str]:
    """Return the content of a folder, to check that a command changed nothing."""
    return {
        str(path.relative_to(folder)): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }
