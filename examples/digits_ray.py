"""Train the net of ``digits_loop.py`` with two workers of Ray Train. Kill a worker, or this program, and it goes on.

It continues from the newest checkpoint. It ends with the same weights as a run that was never killed. If a worker is
killed, Ray starts both again; if this program is killed, run it again. The lines with a ``+`` are those that
torch-checkpointer needs.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import xxhash
from checkpointer_torch import Loop  # +
from digits_loop import BATCH, POLICY, load_splits, make_net, measure  # + POLICY
from ray.train.torch import TorchTrainer, prepare_data_loader, prepare_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def report_to_ray(loop: Loop, directory: str, reported: str) -> str:
    """Report the newest checkpoint, unless it was reported; return its name. All workers call it after each step."""
    last = loop.last
    if last is None or last.name == reported:
        return reported
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "where.json").write_text(json.dumps({"directory": directory, "name": last.name}))
        is_first = ray.train.get_context().get_world_rank() == 0
        pointer = ray.train.Checkpoint.from_directory(folder) if is_first else None
        ray.train.report(dict(last.metrics), checkpoint=pointer)
    return last.name


def train(config: dict[str, Any]) -> str:
    """Run on each worker; return the digest of the weights."""
    torch.set_num_threads(1)
    torch.manual_seed(3)
    splits = load_splits()
    model = prepare_model(make_net())
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.8)
    loader = prepare_data_loader(DataLoader(TensorDataset(*splits["train"]), BATCH, shuffle=True))

    with Loop(config["directory"], POLICY, model=model, optimizer=optimizer, scheduler=scheduler) as loop:  # +
        loop.resume()  # +
        reported = ""
        print(f"begins at step {loop.progress.step}")
        for _ in loop.epochs(config["epochs"]):
            for images, labels in loop.batches(loader):
                loss = nn.functional.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                loop.step({"train_loss": loss.detach()})  # +
                reported = report_to_ray(loop, config["directory"], reported)
            scheduler.step()
            val_loss, val_accuracy = measure(model, *splits["val"])
            loop.report({"val_loss": val_loss, "val_accuracy": val_accuracy})  # +
        report_to_ray(loop, config["directory"], reported)
    weights = b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
    return xxhash.xxh3_128_hexdigest(weights)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", default="runs/digits-ray", help="a folder that all workers see, or a URL")
    parser.add_argument("--storage", type=Path, default=Path("runs/ray"), help="the folder of Ray's own files")
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args(argv)
    directory = args.directory if "://" in args.directory else str(Path(args.directory).resolve())

    if os.environ.get("RAY_ADDRESS"):
        ray.init()
    else:
        ray.init("local", num_cpus=2, include_dashboard=False)
    trainer = TorchTrainer(
        train,
        train_loop_config={"directory": directory, "epochs": args.epochs},
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(
            name="digits",
            storage_path=str(args.storage.resolve()),
            failure_config=ray.train.FailureConfig(max_failures=3),
        ),
    )
    result = trainer.fit()
    best = result.get_best_checkpoint("val_loss", "min")
    if best is not None:
        with best.as_directory() as folder:
            print(f"best: {json.loads(Path(folder, 'where.json').read_text())['name']}")
    print(f"weights xxh3-128 {result.return_value}")


if __name__ == "__main__":
    main()
