"""What a step of the Trainer costs with our callback when nothing is due, beside a callback that does nothing."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import itertools

import torch
import transformers
from checkpointer_transformers import CheckpointCallback, attach
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from checkpointer import AnyOf, EverySeconds, EverySteps, KeepBest, KeepLast, Policy

STEPS = 400
ROUNDS = 9
CALLS = 20_000


class Nothing(TrainerCallback):
    """Gets the events that ours gets, and does nothing."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None: ...

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None: ...

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None: ...


class Line(nn.Module):
    """The smallest model that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.layer(x).pow(2).mean()}


class Points(Dataset[dict[str, Tensor]]):
    """Points at one place."""

    def __len__(self) -> int:
        return 2 * STEPS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": torch.ones(2)}


KEEP = [KeepBest(2, "eval_loss", mode="min"), KeepLast(1)]
KINDS: dict[str, Any] = {
    "a callback that does nothing": lambda: Nothing(),
    "ours, every n steps": lambda: CheckpointCallback(Policy(EverySteps(10**9), KEEP)),
    "ours, every n steps or seconds": lambda: CheckpointCallback(
        Policy(AnyOf(EverySteps(10**9), EverySeconds(1e9)), KEEP)
    ),
}


def make(folder: str, callback: TrainerCallback, *, attached: bool = False) -> Trainer:
    """Return a Trainer that logs and saves nothing."""
    args = TrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(Line(), args, train_dataset=Points(), callbacks=[callback])
    if attached:
        attach(trainer)
    return trainer


def per_step(trainer: Trainer) -> float:
    """Return the seconds that the callback's three events of a step take, as the Trainer calls them."""
    handler, args, state, control = trainer.callback_handler, trainer.args, trainer.state, trainer.control
    state.global_step, state.epoch = 5, 0.5
    began = time.perf_counter()
    for _ in range(CALLS):
        handler.on_step_begin(args, state, control)
        handler.on_pre_optimizer_step(args, state, control)
        handler.on_step_end(args, state, control)
    return (time.perf_counter() - began) / CALLS


def measure(callback: TrainerCallback, *, attached: bool) -> tuple[float, float]:
    """Return seconds per step of a whole training, and of the events alone."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(folder, callback, attached=attached)
        spans: list[float] = []

        class Watch(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                spans.append(time.perf_counter())

        trainer.add_callback(Watch())
        # The policies here save nothing but the end, which is not measured.
        trainer.train()
        whole = statistics.median(after - before for before, after in itertools.pairwise(spans))
        events = make(folder, callback, attached=attached)
        events.state.stateful_callbacks = {}
        events.callback_handler.on_train_begin(events.args, events.state, events.control)
        return whole, per_step(events)


def main() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    rows = {name: (kind, False) for name, kind in KINDS.items()}
    rows["ours, attached"] = (KINDS["ours, every n steps"], True)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    for _ in range(ROUNDS):
        for name, (kind, attached) in rows.items():
            found[name].append(measure(kind(), attached=attached))
    table = Table("", "a step", "its three events", title=f"Nothing due: medians of {ROUNDS} rounds, in microseconds")
    for name, rounds in found.items():
        columns = [f"{1e6 * statistics.median(column):.1f}" for column in zip(*rounds, strict=True)]
        table.add_row(name, *columns)
    Console(soft_wrap=True).print(table)


if __name__ == "__main__":
    main()
