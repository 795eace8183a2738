"""The drop-in beside Lightning's own class, in real trainings: what 30 saves cost, and what a batch costs without one.

Run it with ``make bench-lightning``. Trainings of both take turns in one process; medians are printed. Bytes are those
that the process hands to the kernel (``wchar`` in ``/proc/self/io``) and those of them that are meant for a disk
(``write_bytes``); links and clones are neither, because they write no bytes. Timings on a busy machine are noisy.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import lightning.pytorch as pl
import torch
from checkpointer_lightning import ModelCheckpoint as Ours
from lightning.pytorch.callbacks import ModelCheckpoint as Theirs
from lightning.pytorch.plugins.io import TorchCheckpointIO
from table import Row, compared, show
from torch.utils.data import DataLoader

MEGABYTES = 200
SAVES = 30
CALLS = 20_000
TURNS = 7


@attrs.frozen
class Cost:
    """What a training took."""

    seconds: float
    written: int
    to_disk: int
    dumps: int


class Module(pl.LightningModule):
    """One weight that is trained, many that are saved, and a score that gets better with each epoch."""

    def __init__(self, megabytes: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.register_buffer("rest", torch.randn(megabytes * 2**20 // 4))
        self.dumps = 0
        self.at_batch: Callable[[], None] = lambda: None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.at_batch()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).sum()

    def on_train_epoch_end(self) -> None:
        self.log("score", float(self.current_epoch))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.dumps += 1

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Durable(TorchCheckpointIO):
    """Lightning's writing, and then what makes it survive a power loss."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write and wait for the disk."""
        super().save_checkpoint(checkpoint, path, storage_options)
        for name in (path, os.path.dirname(path)):
            opened = os.open(name, os.O_RDONLY)
            os.fsync(opened)
            os.close(opened)


def fit(callbacks: Any, module: pl.LightningModule, epochs: int, **kw: Any) -> None:
    """Train one batch per epoch."""
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    loader: DataLoader[Any] = DataLoader(torch.ones(1, 1))  # type: ignore[arg-type]
    pl.Trainer(callbacks=callbacks, max_epochs=epochs, **silent, **kw).fit(module, loader)


def _written() -> tuple[int, int]:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["wchar"]), int(fields["write_bytes"])


def cost_of(cls: type, module: Module, **kw: Any) -> Cost:
    """Return what a training with so many saves takes, in a folder of its own."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        callback = cls(dirpath=folder, monitor="score", mode="max", save_top_k=3, save_last=True)
        os.sync()
        module.dumps, before, start = 0, _written(), time.perf_counter()
        fit(callback, module, SAVES, **kw)
        seconds = time.perf_counter() - start
        written, to_disk = (after - first for after, first in zip(_written(), before, strict=True))
        assert len(callback.best_k_models) == 3
    return Cost(seconds, written, to_disk, module.dumps)


def saves(megabytes: int, repeats: int) -> list[Row]:
    """Return the rows of the saves."""
    module = Module(megabytes)
    sides: dict[str, Callable[[], Cost]] = {
        "ours": lambda: cost_of(Ours, module),
        "Lightning": lambda: cost_of(Theirs, module),
        "Lightning + fsync": lambda: cost_of(Theirs, module, plugins=[Durable()]),
    }
    costs: dict[str, list[Cost]] = {name: [] for name in sides}
    for turn in range(repeats):
        for name in sorted(sides, reverse=bool(turn % 2)):
            costs[name].append(sides[name]())
    what = f"{SAVES} saves of {megabytes} MB"

    def median(name: str, field: str) -> float:
        return float(statistics.median(getattr(cost, field) for cost in costs[name]))

    rows = []
    for peer, goal in (("Lightning", "<= 0.6 x"), ("Lightning + fsync", "")):
        times = median("ours", "seconds"), median(peer, "seconds")
        rows.append(compared(what, times[0], peer, times[1], unit="s", goal=goal))
    for text, field in (("bytes written", "written"), ("bytes to the disk", "to_disk")):
        ours, theirs = median("ours", field), median("Lightning", field)
        rows.append(compared(f"{what}: {text}", ours, "Lightning", theirs, scale=1e-9, unit="GB", goal="<= 0.5 x"))
    ours, theirs = median("ours", "dumps"), median("Lightning", "dumps")
    rows.append((f"{what}: state dumps", f"{ours:.0f}", "Lightning", f"{theirs:.0f}", f"{ours / theirs:.2f} x"))
    return rows


def batch_without_a_save() -> Row:
    """Return the row of a batch at whose end nothing is due, for both in the same Trainer."""
    found: dict[str, list[float]] = {"ours": [], "Lightning": []}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        both: dict[str, Any] = {
            "ours": Ours(Path(folder, "ours"), every_n_train_steps=10**9),
            "Lightning": Theirs(Path(folder, "theirs"), every_n_train_steps=10**9 + 1),
        }
        module = Module(1)

        def measure() -> None:
            if not module.global_step:
                return
            for turn in range(TURNS):
                for name in sorted(both, reverse=bool(turn % 2)):
                    hook, start = both[name].on_train_batch_end, time.perf_counter()
                    for _ in range(CALLS):
                        hook(module.trainer, module, None, None, 0)
                    found[name].append((time.perf_counter() - start) / CALLS)

        module.at_batch = measure
        fit(list(both.values()), module, 2)
    ours, theirs = (statistics.median(found[name]) for name in ("ours", "Lightning"))
    return compared("a batch, nothing due", ours, "Lightning", theirs, scale=1e6, unit="us", goal="<= 1 x")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=MEGABYTES)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    show([*saves(arguments.megabytes, arguments.repeats), batch_without_a_save()])


if __name__ == "__main__":
    main()
