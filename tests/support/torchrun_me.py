"""A training for torchrun, by a plain loop or a Trainer. Each rank writes its first step and its progress to files."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from checkpointer import EverySteps, KeepLast, Policy

POLICY = Policy(EverySteps(1_000_000), [KeepLast(1)])
READY = 3
"""Steps of this process after which a signal may come."""
BATCHES = 16


class Notes:
    """The files that this rank writes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rank, self.steps = folder, os.environ["RANK"], 0

    def begin(self, step: int) -> None:
        self._write("begin", step)

    def step(self) -> None:
        time.sleep(0.02)
        self.steps += 1
        if self.steps == READY:
            self._write("ready", os.getpid())

    def _write(self, name: str, number: int) -> None:
        staged = self.folder / f"{name}-{self.rank}.new"
        staged.write_text(str(number))
        os.replace(staged, self.folder / f"{name}-{self.rank}")


def train_loop(directory: Path, steps: int, notes: Notes) -> None:
    """Train to the end of the epoch that contains this step."""
    import torch
    import torch.distributed as dist
    from checkpointer_torch import Loop
    from torch.utils.data import DataLoader, TensorDataset

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loader = DataLoader(TensorDataset(torch.rand(4 * BATCHES, 2)), 4, num_workers=1)
    with Loop(directory, POLICY, model=model, optimizer=optimizer) as loop:
        loop.resume()
        notes.begin(loop.progress.step)
        for _ in loop.epochs(-(-steps // BATCHES)):
            for (batch,) in loop.batches(loader):
                optimizer.zero_grad()
                model(batch).square().mean().backward()
                optimizer.step()
                loop.step()
                notes.step()
    dist.destroy_process_group()


def train_trainer(directory: Path, steps: int, notes: Notes) -> None:
    """Train to this step, without an evaluation."""
    from hf_tiny import make_trainer
    from transformers import TrainerCallback

    class Noting(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            notes.begin(state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            notes.step()

    changes: dict[str, Any] = {"ddp_backend": "gloo", "per_device_train_batch_size": 2, "eval_strategy": "no"}
    changes |= {"max_steps": steps, "dataloader_num_workers": 1, "logging_strategy": "no"}
    trainer = make_trainer(directory, POLICY, attached=True, callbacks=[Noting()], **changes)
    trainer.train(resume_from_checkpoint=bool(list(directory.glob("checkpoint-*"))))


if __name__ == "__main__":
    _, host, folder, last = sys.argv
    train = train_loop if host == "loop" else train_trainer
    train(Path(folder) / "run", int(last), Notes(Path(folder)))
