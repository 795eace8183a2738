"""A training that ends within a validation: the resumed training runs that validation again, from its first batch."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointer_lightning import ModelCheckpoint
from tiny import Model, loader, quiet, trainer

from checkpointer import CheckpointManager

pytestmark = quiet

BATCHES = 5
"""Batches of a validation."""


class Interrupted(Model):
    """Lists the batches of each validation by step; the second validation of a training may be interrupted."""

    def __init__(self, by: str = "") -> None:
        super().__init__()
        self.by = by
        self.validated: list[tuple[int, list[int]]] = []

    def on_validation_start(self) -> None:
        self.validated.append((self.global_step, []))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated[-1][1].append(batch_idx)
        is_interrupted = len(self.validated) == 2 and batch_idx == 2
        if is_interrupted and self.by == "an exception":
            raise ZeroDivisionError(self.by)
        if is_interrupted and self.by == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        self.log("val_loss", torch.tensor(float(batch_idx)))

    def on_validation_epoch_end(self) -> None:
        if self.by == "an exception after the batches" and len(self.validated) == 2:
            raise ZeroDivisionError(self.by)


@pytest.mark.parametrize("interval", [4, 8], ids=["within an epoch", "at its end"])
@pytest.mark.parametrize("by", ["an exception", "an exception after the batches", "SIGTERM"])
def test_an_interrupted_validation_starts_over(tmp_path: Path, by: str, interval: int) -> None:
    """Lightning itself skips it, or runs as many batches as were left, so that the metric is of a part of the data."""

    def train(model: Interrupted, resume: str | None = None) -> None:
        callback = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1, save_on_exception=True)
        training = trainer(callback, val_check_interval=interval, num_sanity_val_steps=0, max_epochs=3)
        training.fit(model, loader(8), loader(BATCHES), ckpt_path=resume)

    with pytest.raises(SystemExit if by == "SIGTERM" else ZeroDivisionError):
        train(interrupted := Interrupted(by))
    step = interrupted.validated[-1][0]
    rescue = CheckpointManager(tmp_path).records[-1]
    assert (2 * interval, "rescue") == (step, rescue.kind)

    train(resumed := Interrupted(), str(tmp_path / rescue.name))
    every = list(range(BATCHES))
    assert [(at, every) for at in range(step, 25, interval)] == resumed.validated
    losses = {record.step: record.metrics.get("val_loss") for record in CheckpointManager(tmp_path).records}
    assert {2.0} == {loss for at, loss in losses.items() if at >= step and at % 8 == 0}
