"""Train a small convolutional net on handwritten digits. Kill it at any time and run it again.

It continues from the newest checkpoint. It ends with the same weights as a run that was never killed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import xxhash
from checkpointer_torch import Loop, load_weights
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from checkpointer import AnyOf, CheckpointManager, EveryEpochs, EverySteps, KeepBest, KeepLast, Policy, explain

BATCH = 32
POLICY = Policy(
    when=AnyOf(EveryEpochs(1), EverySteps(25)),
    keep=[KeepBest(3, "val_loss", mode="min"), KeepLast(1)],
    name="{epoch}-{step}-{val_loss:.3f}",
    last="link",
)


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
    """Return a table of the checkpoints and the reasons why they are kept."""
    table = Table("name", "step", "val_loss", "why", title=f"Kept in {directory}")
    table.columns[0].no_wrap = True
    reasons = explain(manager.policy, manager.session.manifest)
    for record in manager.records:
        loss = f"{record.metrics['val_loss']:.4f}" if "val_loss" in record.metrics else ""
        aliases = [f"<- {a}" for a in manager.policy.aliases if (directory / a).resolve().name == record.name]
        why = "\n".join(reasons.get(record.name, ()))
        table.add_row("\n".join([record.name, *aliases]), str(record.step), loss, why)
    return table


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path("runs/digits"))
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(3)
    console = Console(soft_wrap=True)
    model, splits = make_net(), load_splits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.8)
    loader = DataLoader(TensorDataset(*splits["train"]), BATCH, shuffle=True)

    bar = Progress(console=console, disable=args.quiet)
    with Loop(args.directory, POLICY, model=model, optimizer=optimizer, scheduler=scheduler) as loop, bar:
        start = loop.resume()
        if start.source:
            console.print(f"resumed from {start.source} at step {start.step} of {args.epochs * len(loader)}")
        for epoch in loop.epochs(args.epochs):
            # After a resume within an epoch the bar begins where the training does.
            task = bar.add_task(f"epoch {epoch + 1}", total=len(loader), completed=loop.progress.batch)
            for images, labels in loop.batches(loader):
                loss = nn.functional.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                bar.advance(task)
                loop.step({"train_loss": loss.detach()})
            scheduler.step()
            val_loss, val_accuracy = measure(model, *splits["val"])
            loop.report({"val_loss": val_loss, "val_accuracy": val_accuracy})
        bar.stop()
        console.print(table_of(loop.manager, args.directory))
        if loop.best is not None:
            best = make_net()
            load_weights(best, args.directory / loop.best.name)
            accuracy = measure(best, *splits["test"])[1].item()
            console.print(f"best: {loop.best.name} classifies {accuracy:.1%} of the test digits correctly")
    console.print(f"to train again from the beginning, remove its checkpoints: rm -r {args.directory}")
    weights = b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
    digest = xxhash.xxh3_128_hexdigest(weights)
    console.print(f"weights xxh3-128 {digest} (the same after any kill; another processor may round differently)")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(128 + 2)  # As of SIGINT. The loop has logged at which step it stopped, and what it saved.
