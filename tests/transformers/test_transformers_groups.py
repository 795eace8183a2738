"""A signal to the whole process group, from another process: the workers of loaders get it too."""

from __future__ import annotations

import multiprocessing
import signal
from pathlib import Path
from typing import Any

import pytest
from checkpointer_transformers import attach
from hf_tiny import STEPS, At, Text, make_trainer, quiet, records
from support.grouped import Wait, in_group
from transformers import Trainer, TrainerCallback

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

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise AssertionError("the evaluation went on to its end")


def train(wait: Wait, directory: Path, where: str, number: int, start: str) -> None:
    """Train with workers until the signal comes."""
    multiprocessing.set_start_method(start, force=True)  # How the workers start.

    class Writing(Trainer):
        """Waits for the signal within a save."""

        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            super()._save_optimizer_and_scheduler(output_dir)
            wait()

    waiting = Evaluating(wait) if where == "evaluation" else At(2 if where == "step" else 1000, wait)
    workers: dict[str, Any] = {"dataloader_num_workers": 2, "dataloader_persistent_workers": where == "step"}
    policy = Policy(EverySteps(3 if where == "save" else 1000), [KeepLast(1)])
    trainer = make_trainer(
        directory,
        policy,
        callbacks=[waiting],
        kind=Writing if where == "save" else Trainer,
        eval_dataset=Text(48, 400),
        max_steps=1000,
        **workers,
    )
    attach(trainer, signals=(number,))
    trainer.train()


@pytest.mark.parametrize(
    ("where", "step", "number", "start"),
    [
        ("step", 3, signal.SIGTERM, "fork"),
        ("step", 3, signal.SIGINT, "fork"),
        ("step", 3, signal.SIGUSR1, "spawn"),
        ("evaluation", STEPS, signal.SIGTERM, "fork"),
        ("evaluation", STEPS, signal.SIGUSR1, "fork"),
        ("save", 3, signal.SIGTERM, "fork"),
    ],
)
def test_it_saves_once_and_ends_by_the_signal(tmp_path: Path, where: str, step: int, number: int, start: str) -> None:
    """At the end of the step; or after a batch of the evaluation, or after the save, before another step is taken."""
    code, _ = in_group(train, tmp_path, where, number, start, number=number, start="fork")
    assert (1 if number == signal.SIGINT else -number) == code
    assert [f"checkpoint-{step}"] == list(records(tmp_path))
