"""Train the net of ``digits_loop.py`` with Lightning. Kill it at any time and run it again.

It continues from the newest checkpoint. It ends with the same weights as a run that was never killed.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import xxhash
from checkpointer_lightning import CheckpointCallback
from digits_loop import BATCH, load_splits, make_net, table_of
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from checkpointer import CheckpointManager, EveryEpochs, KeepBest, KeepLast, Policy

POLICY = Policy(
    when=EveryEpochs(1),
    keep=[KeepBest(3, "val_loss", mode="min"), KeepLast(1)],
    name="{epoch}-{step}-{val_loss:.3f}",
    last="link",
    rescue=False,  # Ctrl-C may come in the middle of a step, so resume from the last regular save instead
)


class Digits(pl.LightningModule):
    """A small convolutional net. The epoch is the random seed of its steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = make_net()

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(self.current_epoch)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        scores = self.net(images)
        self.log("val_loss", nn.functional.cross_entropy(scores, labels))
        self.log("val_accuracy", (scores.argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=5e-3)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.8)]


class Batches:
    """The batches of an epoch, shuffled with the epoch as the seed."""

    def __init__(self, images: Tensor, labels: Tensor, module: pl.LightningModule) -> None:
        self.images, self.labels, self.module = images, labels, module

    def __len__(self) -> int:
        return -(-len(self.labels) // BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        shuffled = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(self.module.current_epoch))
        yield from ((self.images[part], self.labels[part]) for part in torch.split(shuffled, BATCH))


def whole(split: tuple[Tensor, Tensor]) -> DataLoader[tuple[Tensor, ...]]:
    """Return a split as one batch."""
    return DataLoader(TensorDataset(*split), batch_size=len(split[0]))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path("runs/digits-lightning"))
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    console, module, splits = Console(soft_wrap=True), Digits(), load_splits()

    trainer = pl.Trainer(
        max_epochs=args.epochs,
        callbacks=CheckpointCallback(args.directory, POLICY),
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, Batches(*splits["train"], module), whole(splits["val"]), ckpt_path="last")
    if trainer.ckpt_path:
        console.print(f"resumed from {Path(trainer.ckpt_path).resolve().name}")
    manager = CheckpointManager(args.directory, POLICY)
    console.print(table_of(manager, args.directory))
    (tested,) = trainer.validate(module, whole(splits["test"]), ckpt_path="best", verbose=False)
    console.print(
        f"best: {Path(str(trainer.ckpt_path)).name} classifies {tested['val_accuracy']:.1%} of the test digits "
        "correctly"
    )
    newest = torch.load(args.directory / "last.ckpt", weights_only=True)["state_dict"]
    weights = b"".join(tensor.numpy().tobytes() for tensor in newest.values())
    console.print(f"weights xxh3-128 {xxhash.xxh3_128_hexdigest(weights)}")


if __name__ == "__main__":
    main()
