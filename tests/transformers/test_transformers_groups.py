"""A SIGTERM to the whole process group, from another process: the workers of loaders get it too."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from hf_tiny import STEPS, At, Text, make_trainer, quiet, records
from support.grouped import Wait, in_group
from transformers import TrainerCallback

from checkpointer import EverySteps, KeepLast, Policy

pytestmark = [pytest.mark.slow, quiet]


class Evaluating(TrainerCallback):
    """Waits for the signal within an evaluation."""

    def __init__(self, wait: Wait) -> None:
        self.wait = wait
        self.batches = 0

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Each of the two workers has given a batch by then: one that is still starting is not covered yet.
        self.batches += 1
        if self.batches == 3:
            self.wait()


def train(wait: Wait, directory: Path, where: str) -> None:
    """Train with workers until the signal comes."""
    waiting = At(2, wait) if where == "step" else Evaluating(wait)
    workers: dict[str, Any] = {"dataloader_num_workers": 2, "dataloader_persistent_workers": where == "step"}
    policy = Policy(EverySteps(1000), [KeepLast(1)])
    options: dict[str, Any] = {"attached": True, "eval_dataset": Text(32, 400), "max_steps": 1000}
    make_trainer(directory, policy, callbacks=[waiting], **options, **workers).train()


@pytest.mark.parametrize(("where", "step"), [("step", 3), ("evaluation", STEPS)])
def test_it_saves_once_and_ends_by_the_signal(tmp_path: Path, where: str, step: int) -> None:
    """At the end of the step; or of the evaluation, before another step is taken."""
    code, _ = in_group(train, tmp_path, where, start="fork")
    assert -signal.SIGTERM == code
    assert [f"checkpoint-{step}"] == list(records(tmp_path))
