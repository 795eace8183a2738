"""A language model small enough to train in a test: a GPT of one layer that reads the Zen of Python byte by byte."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import transformers
from checkpointer_transformers import CheckpointCallback, attach
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from checkpointer import CheckpointManager, Policy

with contextlib.redirect_stdout(io.StringIO()):
    import this

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

quiet = pytest.mark.filterwarnings(
    # What the Trainer says is not what is tested here; what this library says is.
    "ignore::UserWarning",
    "ignore::FutureWarning",
    "ignore::DeprecationWarning",
    "error::checkpointer.CheckpointerWarning",
)

TEXT = codecs.decode(this.s, "rot13").encode()
WINDOW = 16
BATCH = 4
STEPS = 5
"""Steps in an epoch."""


class Text(Dataset[dict[str, torch.Tensor]]):
    """Windows of the text."""

    def __init__(self, windows: int, start: int = 0) -> None:
        self.starts = range(start, start + 8 * windows, 8)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = self.starts[index]
        window = torch.tensor(list(TEXT[start : start + WINDOW]))
        return {"input_ids": window, "labels": window}


def make_model() -> Any:
    """Return the model with the same weights each time; it has dropout, so randomness counts."""
    torch.manual_seed(0)
    sizes = {"n_positions": WINDOW, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=128, bos_token_id=0, eos_token_id=0, **sizes))
    model.loss_type = "ForCausalLM"
    return model


class At(TrainerCallback):
    """Does something when a step begins."""

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self.step, self.act = step, act

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.act()


def arguments(directory: str | Path, **changes: Any) -> TrainingArguments:
    """Return arguments that fit the callback: two epochs, an evaluation at every fifth step."""
    fitting = {
        "max_steps": 2 * STEPS,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "eval_strategy": "steps",
        "eval_steps": STEPS,
        "logging_steps": STEPS,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(str(directory), **{**fitting, **changes})


def make_trainer(
    directory: str | Path,
    policy: Policy | None,
    *,
    callbacks: Iterable[TrainerCallback] = (),
    scores: Mapping[int, float] | None = None,
    attached: bool = False,
    options: Mapping[str, Any] | None = None,
    eval_dataset: Any = None,
    model: Any = None,
    kind: type[Trainer] = Trainer,
    **changes: Any,
) -> Trainer:
    """Return a Trainer with our callback first; ``scores`` are what its evaluations give as ``eval_score``, by step."""
    ours = [] if policy is None else [CheckpointCallback(policy, **(options or {}))]

    def measure(prediction: Any) -> dict[str, float]:
        return {"score": (scores or {})[trainer.state.global_step]}

    trainer = kind(
        model or make_model(),
        arguments(directory, **changes),
        train_dataset=Text(STEPS * BATCH),
        eval_dataset=eval_dataset or Text(8, 400),
        compute_metrics=None if scores is None else measure,
        callbacks=[*ours, *callbacks],
    )
    if attached:
        attach(trainer)
    return trainer


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return a copy of the weights."""
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Return whether the weights are the same, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def folders(directory: str | Path) -> list[str]:
    """Return what lies in the run's directory, without our own bookkeeping."""
    return sorted(name for name in os.listdir(directory) if name != ".checkpointer")


def records(directory: str | Path) -> dict[str, Any]:
    """Return the run's records by name."""
    return {record.name: record for record in CheckpointManager(directory).records}
