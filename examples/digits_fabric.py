"""Train the net of ``digits_loop.py`` with Lightning Fabric. Kill it at any time and run it again.

It continues from the newest checkpoint. It ends with the same weights as a run that was never killed. Two processes:
``python examples/digits_fabric.py --devices 2``. The lines with a ``+`` are those that torch-checkpointer needs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import xxhash
from checkpointer_torch import Loop  # +
from digits_loop import BATCH, POLICY, load_splits, make_net, measure  # + POLICY
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

MICRO_BATCHES = 2
"""Batches whose gradients are accumulated for one step."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path("runs/digits-fabric"))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--devices", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)

    fabric = Fabric(accelerator="cpu", devices=args.devices, strategy="ddp" if args.devices > 1 else "auto")
    fabric.launch()
    fabric.seed_everything(3, verbose=False)
    net, splits = make_net(), load_splits()
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=5e-3))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.8)
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(*splits["train"]), BATCH, shuffle=True))
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "precision": fabric.strategy.precision}

    with Loop(args.directory, POLICY, **state) as loop:  # +
        loop.resume()  # +
        fabric.print(f"begins at step {loop.progress.step}")
        for _ in loop.epochs(args.epochs):
            for number, (images, labels) in enumerate(loop.batches(loader), loop.progress.batch + 1):
                is_accumulating = number % MICRO_BATCHES != 0 and number < len(loader)
                with fabric.no_backward_sync(model, enabled=is_accumulating and args.devices > 1):
                    fabric.backward(nn.functional.cross_entropy(model(images), labels) / MICRO_BATCHES)
                if not is_accumulating:
                    optimizer.step()
                    optimizer.zero_grad()
                    loop.step()  # +
            scheduler.step()
            val_loss, val_accuracy = measure(model, *splits["val"])
            loop.report({"val_loss": val_loss, "val_accuracy": val_accuracy})  # +
    weights = b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
    fabric.print(f"weights xxh3-128 {xxhash.xxh3_128_hexdigest(weights)}")


if __name__ == "__main__":
    main()
