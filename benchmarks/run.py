"""Side-by-side measurements: each prints what we take, what the peer or the raw operation takes, and the ratio.

Run it with ``make bench``. Both sides of a ratio are measured in one process, interleaved; medians are printed.
Peers that are not installed are said to be missing. Nothing here is a test: timings on a busy machine are noisy.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from directories import records_of
from table import Row, compared, show

from checkpointer import CheckpointManager, EverySteps, KeepAll, KeepLast, Policy


def per_call(call: Callable[[int], object], calls: int, repeats: int) -> list[float]:
    """Return seconds per call, once per repeat; ``call`` gets a number that keeps rising."""
    times = []
    number = 0
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            number += 1
            call(number)
        times.append((time.perf_counter() - start) / calls)
    return times


def observe_not_due() -> list[Row]:
    """`observe` when nothing is due, beside an empty function with the same signature and orbax if installed."""
    manager = CheckpointManager(None, Policy(EverySteps(10**9), [KeepLast(1)]), state=dict)
    metrics = {"loss": torch.tensor(0.5)}

    def empty(metrics: object, step: int, epoch: int, *, epoch_end: bool | None = None) -> None:
        return None

    ours = statistics.median(per_call(lambda n: manager.observe(metrics, n, 0, epoch_end=False), 100_000, 7))
    raw = statistics.median(per_call(lambda n: empty(metrics, n, 0, epoch_end=False), 100_000, 7))
    rows = [compared("observe, not due", ours, "empty function", raw, scale=1e6, unit="us", goal="<= 1 us")]
    lightning = _lightning_hook()
    if lightning is None:
        rows.append(("observe, not due", f"{ours * 1e6:.3f} us", "Lightning hook", "not installed", "-"))
    else:
        theirs = statistics.median(per_call(lightning, 20_000, 7))
        rows.append(compared("observe, not due", ours, "Lightning hook", theirs, scale=1e6, unit="us", goal="<= 1 us"))
    return rows


def _lightning_hook() -> Callable[[int], object] | None:
    try:
        import lightning.pytorch as pl
        from lightning.pytorch.callbacks import ModelCheckpoint
        from lightning.pytorch.trainer.states import TrainerFn
    except ImportError:
        return None
    trainer = pl.Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    callback = ModelCheckpoint(every_n_train_steps=10**9)
    module = pl.LightningModule()
    trainer.state.fn = TrainerFn.FITTING
    return lambda n: callback.on_train_batch_end(trainer, module, None, None, n)


def save_512mb(repeats: int) -> list[Row]:
    """A blocking save to durable, beside ``torch.save`` and fsync of the same state on the same disk."""
    floats = 512 * 2**20 // 4
    state = {"a": torch.randn(floats // 2), "b": torch.randn(floats // 4), "c": [torch.randn(floats // 4)]}
    ours, raw = [], []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        policy = Policy(EverySteps(1), [KeepLast(1)])
        with CheckpointManager(Path(folder, "ours"), policy, state=lambda: state) as manager:
            for number in range(1, repeats + 1):
                for side in (0, 1) if number % 2 else (1, 0):
                    # Both write a new file and then drop the one before, so that the disk does the same work.
                    os.sync()
                    start = time.perf_counter()
                    if side:
                        manager.observe({}, step=number, epoch=0, epoch_end=False)
                        ours.append(time.perf_counter() - start)
                    else:
                        _raw_save(state, Path(folder, f"raw-{number}.pt"))
                        Path(folder, f"raw-{number - 1}.pt").unlink(missing_ok=True)
                        raw.append(time.perf_counter() - start)
    # The first pair warms the page cache and the disk up.
    left, right = statistics.median(ours[1:]), statistics.median(raw[1:])
    return [compared("save 512 MB", left, "torch.save + fsync", right, unit="s", goal="<= 1.15 x")]


def _raw_save(state: object, path: Path) -> None:
    torch.save(state, path)
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


_MEMORY = """
import tempfile, torch
from pathlib import Path
from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy
state = {"a": torch.ones(64 * 2**20), "b": torch.ones(64 * 2**20)}
with tempfile.TemporaryDirectory(dir=".") as folder:
    small = CheckpointManager(folder + "/a", Policy(EverySteps(1), [KeepLast(1)]), state=lambda: {"a": torch.ones(8)})
    small.observe({}, step=1, epoch=0)
    big = CheckpointManager(folder + "/b", Policy(EverySteps(1), [KeepLast(1)]), state=lambda: state)
    # Not ru_maxrss: a child inherits its parent's.
    Path("/proc/self/clear_refs").write_text("5")
    peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    before = peak()
    big.observe({}, step=1, epoch=0)
    print(peak() - before)
"""


def memory_of_a_save() -> list[Row]:
    """Peak memory that a save of 512 MB adds, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=True)
    extra = float(done.stdout)
    ratio = f"{extra / 512:.3f} x (goal <= 64 MB)"
    return [("extra memory of a save", f"{extra:.1f} MB", "the state", "512.0 MB", ratio)]


def open_10_000(repeats: int) -> list[Row]:
    """Open a directory of 10 000 records through the index, beside reading each record file."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        records = Path(folder, ".checkpointer", "records")
        records.mkdir(parents=True)
        for name, record in records_of(10_000):
            (records / f"{name}.json").write_bytes(record)
            Path(folder, name).touch()
        policy = Policy(EverySteps(1), [KeepAll()])
        with CheckpointManager(folder, policy, state=dict) as manager:
            assert len(manager.records) == 10_000
        ours, raw = [], []
        for _ in range(repeats):
            start = time.perf_counter()
            manager = CheckpointManager(folder, policy)
            ours.append(time.perf_counter() - start)
            assert len(manager.records) == 10_000
            start = time.perf_counter()
            for path in records.iterdir():
                json.loads(path.read_bytes())
            raw.append(time.perf_counter() - start)
    left, right = statistics.median(ours), statistics.median(raw)
    return [compared("open 10 000 records", left, "read + parse each", right, unit="s", goal="< 1 s")]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    show([*observe_not_due(), *save_512mb(repeats), *memory_of_a_save(), *open_10_000(repeats)])
    print(f"peak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MB")


if __name__ == "__main__":
    main()
