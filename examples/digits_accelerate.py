"""Train the net of ``digits_loop.py`` with accelerate. Kill it at any time and run it again.

It continues from the newest checkpoint. It ends with the same weights as a run that was never killed. Two processes,
also without a GPU: ``accelerate launch --multi_gpu --num_processes 2 examples/digits_accelerate.py``. The lines with
a ``+`` are those that torch-checkpointer needs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import xxhash
from accelerate import Accelerator
from accelerate.utils import set_seed
from checkpointer_torch import Loop  # +
from digits_loop import BATCH, POLICY, load_splits, make_net, measure  # + POLICY
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path("runs/digits-accelerate"))
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    set_seed(3)
    net, splits = make_net(), load_splits()
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.98)
    loader = DataLoader(TensorDataset(*splits["train"]), BATCH, shuffle=True)
    model, optimizer, loader, scheduler = accelerator.prepare(net, optimizer, loader, scheduler)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": accelerator.scaler}

    with Loop(args.directory, POLICY, **state) as loop:  # +
        loop.resume()  # +
        accelerator.print(f"begins at step {loop.progress.step}")
        for _ in loop.epochs(args.epochs):
            for images, labels in loop.batches(loader):
                with accelerator.accumulate(model):
                    accelerator.backward(nn.functional.cross_entropy(model(images), labels))
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                loop.step()  # + which counts when the optimizer has stepped
            val_loss, val_accuracy = measure(model, *splits["val"])
            loop.report({"val_loss": val_loss, "val_accuracy": val_accuracy})  # +
    weights = b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
    accelerator.print(f"weights xxh3-128 {xxhash.xxh3_128_hexdigest(weights)}")


if __name__ == "__main__":
    main()
