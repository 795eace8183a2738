"""One scripted training in three hosts: the same losses at the same steps, in every host."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import lightning.pytorch as pl
import torch
import transformers
from checkpointer_lightning import CheckpointCallback as LightningCallback
from checkpointer_torch import Loop
from checkpointer_transformers import CheckpointCallback as TransformersCallback
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments

from checkpointer import Policy

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

STEPS = 4
"""In an epoch."""
VAL_LOSSES = (0.5, float("nan"), 0.25)
"""At the end of each epoch."""
EPOCHS = len(VAL_LOSSES)
LOSSES = (3.0, 2.5, 2.75, 2.25, 2.0, 1.5, 1.75, 1.25, 1.0, 1.0, 0.5, 0.75)
"""At each step."""
NAMES = {
    "loop": {"loss": "loss", "val_loss": "val_loss"},
    "lightning": {"loss": "loss", "val_loss": "val_loss"},
    "transformers": {"loss": "loss", "val_loss": "eval_val_loss"},
}
"""What each host calls what is measured."""


class Numbers(Dataset[dict[str, torch.Tensor]]):
    """As many batches of one as an epoch has steps."""

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.ones(2), "labels": torch.zeros(1)}


class Net(nn.Module):
    """Its weights say how many steps it has learned; its loss is scripted."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        nn.init.zeros_(self.layer.weight)
        self.step = 0

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        loss = self.layer(x).sum() * 0 + LOSSES[min(self.step, len(LOSSES) - 1)]
        return {"loss": loss, "logits": self.layer(x)}

    @torch.no_grad()
    def learn(self) -> None:
        self.step += 1
        self.layer.weight.fill_(self.step)


def run_loop(directory: Path, policy: Policy) -> nn.Module:
    net = Net()
    with Loop(directory, policy, model=net) as loop:
        loop.resume()
        for epoch in loop.epochs(EPOCHS):
            for _ in loop.batches(range(STEPS)):
                loss = net(torch.ones(1, 2))["loss"]
                net.learn()
                loop.step({"loss": loss})
            loop.report({"val_loss": VAL_LOSSES[epoch]})
    return net


class Module(pl.LightningModule):
    """The net in Lightning."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.net(batch["x"])["loss"]
        self.log("loss", loss)
        optimizer: Any = self.optimizers()
        optimizer.step()
        self.net.learn()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", torch.tensor(VAL_LOSSES[self.current_epoch]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)


def run_lightning(directory: Path, policy: Policy) -> nn.Module:
    module = Module()
    silent: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=EPOCHS,
        num_sanity_val_steps=0,
        callbacks=LightningCallback(directory, policy),
        **silent,
    )
    trainer.fit(module, DataLoader(Numbers(), 1), DataLoader(Numbers(), STEPS))
    return module.net


class Learning(transformers.TrainerCallback):
    """The net learns at each step of the Trainer."""

    def __init__(self, net: Net) -> None:
        self.net = net

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.net.learn()


def run_transformers(directory: Path, policy: Policy) -> nn.Module:
    net = Net()
    arguments = TrainingArguments(
        str(directory),
        save_strategy="no",
        eval_strategy="epoch",
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=STEPS,
        learning_rate=0.0,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )

    def measure(prediction: Any) -> dict[str, float]:
        return {"val_loss": VAL_LOSSES[trainer.state.global_step // STEPS - 1]}

    trainer = Trainer(
        net,
        arguments,
        train_dataset=Numbers(),
        eval_dataset=Numbers(),
        compute_metrics=measure,
        callbacks=[TransformersCallback(policy), Learning(net)],
    )
    trainer.train()
    return net


HOSTS: dict[str, Callable[[Path, Policy], nn.Module]] = {
    "loop": run_loop,
    "lightning": run_lightning,
    "transformers": run_transformers,
}


def run(host: str, directory: Path, policy: Policy) -> nn.Module:
    """Train in that host, whatever it warns of by itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return HOSTS[host](directory, policy)


def walk(net: nn.Module) -> Iterator[float]:
    """Yield the weights."""
    for tensor in net.state_dict().values():
        yield from tensor.flatten().tolist()
