"""A SIGTERM to the whole process group, from another process: the workers of loaders get it too."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from checkpointer_lightning import CheckpointCallback, ModelCheckpoint
from support.grouped import Wait, in_group
from tiny import Model, files, quiet, step_of, trainer
from torch.utils.data import DataLoader

from checkpointer import EveryEpochs, KeepLast, Policy

pytestmark = [pytest.mark.slow, quiet]

STEP = 3


class Waiting(pl.Callback):
    """Waits for the signal within a step, or within a validation."""

    def __init__(self, where: str, wait: Wait) -> None:
        self.where, self.wait = where, wait

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.where == "step" and trainer.global_step == STEP - 1:
            self.wait()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        # Lightning has just started the workers: a spawned one takes seconds until it runs Python code of the loader.
        if self.where == "start" and trainer.global_step == STEP:
            self.wait()

    def on_validation_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.where == "validation" and trainer.global_step == STEP and batch_idx == 2:
            self.wait()


class Points(torch.utils.data.Dataset[Any]):
    """Takes its time: batches that lie ready hide what has become of the workers."""

    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> Any:
        time.sleep(0.001)
        return torch.ones(2)


def drop_in(directory: Path) -> Any:
    return ModelCheckpoint(directory, save_on_exception=True)


def composed(directory: Path) -> Any:
    return CheckpointCallback(directory, Policy(EveryEpochs(1), [KeepLast(1)]))


def train(wait: Wait, directory: Path, make: Callable[[Path], Any], where: str) -> None:
    """Train with workers until the signal comes."""
    own: dict[str, Any] = {"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": where != "step"}
    training = trainer([make(directory), Waiting(where, wait)], val_check_interval=STEP, num_sanity_val_steps=0)
    measured: Any = DataLoader(Points(), 4, **own)
    if where == "start":
        measured = DataLoader(torch.ones(400, 2), 4, num_workers=1, multiprocessing_context="spawn")  # type: ignore[arg-type]
    training.fit(Model(), DataLoader(Points(), 4, **own), measured)


@pytest.mark.parametrize(
    ("make", "where", "name"),
    [
        (drop_in, "step", f"epoch=0-step={STEP}.ckpt"),
        (composed, "validation", f"rescue-step={STEP}.ckpt"),
        (composed, "start", f"rescue-step={STEP}.ckpt"),
    ],
    ids=["drop-in", "composed, persistent workers", "composed, a worker that is starting"],
)
def test_it_saves_once_and_ends_as_lightning_ends(tmp_path: Path, make: Any, where: str, name: str) -> None:
    """The batch comes to its end, and Lightning's own exception, a `SystemExit`, is what ends the training."""
    code, _ = in_group(train, tmp_path, make, where, start="fork")
    assert 0 == code
    assert [name] == files(tmp_path)
    assert STEP == step_of(tmp_path / name)
