"""Train the net of ``digits_loop.py`` with the Hugging Face Trainer. Kill it at any time and run it again.

It continues from the newest checkpoint. It ends with the same weights as a run that was never killed.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
import xxhash
from checkpointer_transformers import CheckpointCallback, attach, last_valid_checkpoint
from digits_loop import BATCH, load_splits, make_net
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from checkpointer import CheckpointManager, EveryEpochs, KeepBest, KeepLast, Policy, explain

POLICY = Policy(
    when=EveryEpochs(1),
    keep=[KeepBest(3, "eval_loss", mode="min"), KeepLast(1)],
    last="link",
    best="link",
    rescue=False,  # an exception may come in the middle of a step, so resume from the last regular save instead
)


class Digits(nn.Module):
    """A small convolutional net that also returns its loss, as the Trainer requires."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = make_net()

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        scores = self.net(images)
        return {"loss": nn.functional.cross_entropy(scores, labels), "scores": scores}


class Split(Dataset[dict[str, Tensor]]):
    """One of the splits, one image per item."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"images": self.images[index], "labels": self.labels[index]}


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def table_of(directory: Path) -> Table:
    """Return a table of the checkpoints and the reasons why they are kept."""
    manager = CheckpointManager(directory, POLICY)
    table = Table("name", "eval_loss", "why", title=f"Kept in {directory}")
    reasons = explain(manager.policy, manager.session.manifest)
    for record in manager.records:
        table.add_row(record.name, f"{record.metrics['eval_loss']:.4f}", "\n".join(reasons.get(record.name, ())))
    return table


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path("runs/digits-transformers"))
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    console, splits = Console(soft_wrap=True), {name: Split(*split) for name, split in load_splits().items()}

    trainer = Trainer(
        Digits(),
        TrainingArguments(
            str(args.directory),
            num_train_epochs=args.epochs,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=300,
            learning_rate=5e-3,
            eval_strategy="epoch",
            save_strategy="no",  # the policy decides when
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=splits["train"],
        eval_dataset=splits["val"],
        compute_metrics=accuracy,
        callbacks=[CheckpointCallback(POLICY)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.args.load_best_model_at_end = True
    attach(trainer)
    found = last_valid_checkpoint(args.directory)
    if found:
        console.print(f"resumed from {Path(found).name}")
    trainer.train(resume_from_checkpoint=found)
    console.print(table_of(args.directory))
    tested = trainer.evaluate(splits["test"], metric_key_prefix="test")
    best = Path(str(trainer.state.best_model_checkpoint)).name
    console.print(f"best: {best} classifies {tested['test_accuracy']:.1%} of the test digits correctly")
    newest = (args.directory / "last" / "model.safetensors").read_bytes()
    console.print(f"weights xxh3-128 {xxhash.xxh3_128_hexdigest(newest)}")


if __name__ == "__main__":
    main()
