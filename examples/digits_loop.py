"""Train a small convolutional net on handwritten digits; kill it anywhere and run it again.

It goes on from the newest checkpoint and ends with the very weights of a run that was never killed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

from checkpointer import AnyOf, CheckpointManager, EveryEpochs, EverySteps, KeepBest, KeepLast, Policy, explain

BATCH = 32
POLICY = Policy(
    when=AnyOf(EveryEpochs(1), EverySteps(25)),
    keep=[KeepBest(3, "val_loss", mode="min"), KeepLast(1)],
    name="{epoch}-{step}-{val_loss:.3f}",
    last="link",
    rescue=False,  # Ctrl-C may strike in the middle of a step: go on from the last whole one instead
)


class Training:
    """Everything that a bit-exact resume needs, at a boundary between two steps."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = make_net()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-3)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, gamma=0.8)
        self.epoch = self.batch = self.step = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": torch.get_rng_state(),
            "progress": (self.epoch, self.batch, self.step),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("model", "optimizer", "scheduler"):
            getattr(self, name).load_state_dict(state[name])
        torch.set_rng_state(state["rng"])
        self.epoch, self.batch, self.step = state["progress"]

    def batches_left(self, size: int) -> Iterator[tuple[Tensor, bool]]:
        """Yield the indices of each batch that this epoch has left, and whether it is the last one."""
        shuffled = torch.randperm(size, generator=torch.Generator().manual_seed(self.epoch))
        batches = torch.split(shuffled, BATCH)
        yield from ((indices, indices is batches[-1]) for indices in batches[self.batch :])

    def learn(self, images: Tensor, labels: Tensor, *, epoch_end: bool) -> dict[str, Tensor]:
        """Take one step, and return what it measured."""
        loss = nn.functional.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.step += 1
        self.batch += 1
        if epoch_end:
            self.scheduler.step()
            self.epoch, self.batch = self.epoch + 1, 0
        return {"train_loss": loss.detach()}


def make_net() -> nn.Sequential:
    features = (nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU())
    return nn.Sequential(*features, nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 4 * 4, 10))


def load_splits() -> dict[str, tuple[Tensor, Tensor]]:
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(digits)
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = zip(("train", "val", "test"), torch.split(shuffled, [1197, 300, 300]), strict=True)
    return {name: (images[part], labels[part]) for name, part in parts}


@torch.no_grad()
def measure(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return loss and accuracy."""
    model.eval()
    scores = model(images)
    model.train()
    return nn.functional.cross_entropy(scores, labels), (scores.argmax(1) == labels).float().mean()


def table_of(manager: CheckpointManager, directory: Path) -> Table:
    """Return what is kept and why."""
    table = Table("name", "step", "val_loss", "why", "alias", title=f"Kept in {directory}")
    table.columns[0].overflow = "fold"
    reasons = explain(manager.policy, manager.manifest)
    for record in manager.records:
        loss = f"{record.metrics['val_loss']:.4f}" if "val_loss" in record.metrics else ""
        aliases = [a for a in manager.policy.aliases if (directory / a).resolve().name == record.name]
        why = "\n".join(reasons.get(record.name, ()))
        table.add_row(record.name, str(record.step), loss, why, ", ".join(aliases))
    return table


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path("runs/digits"))
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    console = Console(soft_wrap=True)
    training, splits = Training(), load_splits()
    images, labels = splits["train"]
    total = args.epochs * -(-len(labels) // BATCH)

    with CheckpointManager(args.directory, POLICY, state=training.state_dict) as manager:
        restored = manager.restore()
        if restored is not None:
            training.load_state_dict(restored.state)
            console.print(f"resumed from {restored.record.name} at step {restored.step} of {total}")
        with Progress(console=console, disable=args.quiet or training.step >= total) as progress:
            bar = progress.add_task("training", total=total, completed=training.step)
            for epoch in range(training.epoch, args.epochs):
                for batch, epoch_end in training.batches_left(len(labels)):
                    metrics = training.learn(images[batch], labels[batch], epoch_end=epoch_end)
                    if epoch_end:
                        metrics["val_loss"], metrics["val_accuracy"] = measure(training.model, *splits["val"])
                    manager.observe(metrics, training.step, epoch, epoch_end=epoch_end)
                    progress.update(bar, completed=training.step, description=f"epoch {epoch + 1}")
        console.print(table_of(manager, args.directory))
        if manager.best is not None:
            best = make_net()
            best.load_state_dict(torch.load(args.directory / manager.best.name, weights_only=True)["model"])
            accuracy = measure(best, *splits["test"])[1].item()
            console.print(f"best: {manager.best.name} has {accuracy:.1%} of the test digits right")
    weights = b"".join(tensor.numpy().tobytes() for tensor in training.model.state_dict().values())
    console.print(f"weights xxh3-128 {xxhash.xxh3_128_hexdigest(weights)}")


if __name__ == "__main__":
    main()
