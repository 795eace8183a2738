"""A training small enough to run beside Lightning's own class in a test: four batches an epoch, seeded, on the CPU."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import pytest
import torch
from packaging.version import Version
from torch.utils.data import DataLoader

quiet = pytest.mark.filterwarnings(
    # What Lightning says is not what is tested here; what this library says is.
    "ignore::UserWarning",
    "ignore::FutureWarning",
    "error::checkpointer.CheckpointerWarning",
)

# Two weights are not worth the waiting of threads for each other.
torch.set_num_threads(1)

BATCHES = 4
"""Training batches, and so steps, in an epoch."""


class Model(pl.LightningModule):
    """Learns nothing much; its ``val_loss`` is scripted, one value per validation."""

    def __init__(self, losses: Sequence[float] = (5.0, 3.0, 4.0, 2.0, 9.0), *, fails_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = torch.nn.Linear(2, 1)
        self.losses = list(losses)
        self.fails_at = fails_at
        self.validations = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.fails_at is not None and self.global_step == self.fails_at:
            raise ZeroDivisionError("the training breaks")
        loss = self.layer(batch).pow(2).mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", torch.tensor(self.losses[self.validations % len(self.losses)]))

    def on_validation_epoch_end(self) -> None:
        self.validations += not self.trainer.sanity_checking

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["validations"] = self.validations

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.validations = checkpoint["validations"]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Forked(Model):
    """Logs a scripted loss as people do: each batch's value, and at the end of an epoch their mean, under one name."""

    def __init__(self, values: Sequence[float]) -> None:
        super().__init__()
        self.values = list(values)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("train_loss", torch.tensor(self.values[self.global_step]), on_step=True, on_epoch=True)
        return self.layer(batch).pow(2).mean()


def loader(batches: int = BATCHES) -> DataLoader[Any]:
    """Return the same random batches each time."""
    data = torch.randn(2 * batches, 2, generator=torch.Generator().manual_seed(1))
    return DataLoader(data, batch_size=2)  # type: ignore[arg-type]


def trainer(callbacks: Any, **kw: Any) -> pl.Trainer:
    """Return a Trainer that says and logs nothing."""
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(callbacks=callbacks, **{"max_epochs": 5, "devices": 1, **silent, **kw})


def fit(callbacks: Any, *, model: pl.LightningModule | None = None, resume: Any = None, **kw: Any) -> pl.Trainer:
    """Train the tiny model from the same seed each time, and return the Trainer."""
    pl.seed_everything(1, verbose=False)
    training = trainer(callbacks, **kw)
    training.fit(model or Model(), loader(), loader(1), ckpt_path=resume)
    return training


def files(directory: str | Path) -> list[str]:
    """Return the paths of what lies in a directory, without our own bookkeeping."""
    found = []
    for folder, folders, names in os.walk(directory):
        folders[:] = [name for name in folders if name != ".checkpointer"]
        found += [os.path.relpath(os.path.join(folder, name), directory) for name in names]
    return sorted(found)


def step_of(path: str | Path) -> int:
    """Return the step that a checkpoint holds."""
    return int(torch.load(path, weights_only=True)["global_step"])


def together(*work: Callable[[], None]) -> None:
    """Run one process per rank, as torchrun does: Lightning calls exception hooks in no process that it has forked."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(work)), "NODE_RANK": "0"}

    def run(rank: int) -> None:
        os.environ.update(shared, LOCAL_RANK=str(rank))
        work[rank]()

    processes = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in range(len(work))]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.is_alive():
            process.kill()


def held(directory: str | Path) -> dict[str, Any]:
    """Return step, epoch and weights of each checkpoint in a directory."""
    found = {}
    for name in files(directory):
        state = torch.load(Path(directory, name), weights_only=True)
        found[name] = state["global_step"], state["epoch"], [value.tolist() for value in state["state_dict"].values()]
    return found


def seen(callback: Any, directory: Path) -> dict[str, Any]:
    """Return what users and loggers see of a callback, with paths relative to its directory."""

    def short(path: str) -> str:
        return path.replace(str(directory), "DIR")

    def number(value: Any) -> str | None:
        return None if value is None else repr(float(value))

    return {
        "best_model_path": short(callback.best_model_path),
        "best_model_score": number(callback.best_model_score),
        "best_k_models": {short(path): number(score) for path, score in callback.best_k_models.items()},
        "kth_best_model_path": short(callback.kth_best_model_path),
        "kth_value": number(callback.kth_value),
        "last_model_path": short(callback.last_model_path),
        "current_score": number(callback.current_score),
        "state_key": callback.state_key,
    }


def is_at_least(version: str) -> bool:
    """Return whether the installed Lightning is that new: older ones behave otherwise in places."""
    return Version(lightning.__version__) >= Version(version)
