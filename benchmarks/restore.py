"""What a verified restore costs beside a plain load: ``python benchmarks/restore.py [--before FOLDER]``.

All sides take turns in one process, on one file, with a warm page cache; ``--before`` names a checkout of another
build, which runs in a process of its own and takes its turns too. Medians are printed. Nothing here is a test.

Before each turn the freed memory goes back to the system, as in a process that restores once. Otherwise the result
depends on what the turn before has freed: page faults take 0.1 to 0.5 s for each GB. "Each byte" maps the file and
reads all bytes. A verified restore has read all bytes too, so no byte is read again after it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from table import show

from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy

_BEFORE = """
import ctypes, gc, sys, time, warnings
warnings.simplefilter("ignore")
import torch
from checkpointer import CheckpointManager
manager = CheckpointManager(sys.argv[1])
manager.restore()
print("ready", flush=True)
for line in sys.stdin:
    options = {"mmap": True} if line.strip() == "mmap" else {}
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    start = time.perf_counter()
    state = manager.restore(**options).state
    print(time.perf_counter() - start, flush=True)
    del state
"""


class Before:
    """Another build, in a process of its own."""

    def __init__(self, checkout: str, folder: str) -> None:
        environment = {**os.environ, "PYTHONPATH": checkout}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BEFORE, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def restore(self, how: str) -> float:
        """Return how long a restore takes there (seconds)."""
        assert self._process.stdin is not None
        print(how, file=self._process.stdin, flush=True)
        return float(self._answer())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def timed(load: Callable[[], Any], *, reads: bool = False) -> Callable[[], float]:
    """Return a call that loads, then may read every byte, and returns how long that takes (seconds)."""

    def run() -> float:
        gc.collect()
        with contextlib.suppress(AttributeError):  # Only glibc has it.
            ctypes.CDLL(None).malloc_trim(0)
        start = time.perf_counter()
        state = load()
        for tensor in state.values() if reads else ():
            tensor.view(torch.int64).sum()
        return time.perf_counter() - start

    return run


def measure(tensors: int, elements: int, repeats: int, before: str) -> None:
    """Print one table for a state of so many tensors of so many elements."""
    with tempfile.TemporaryDirectory(dir=".") as folder, contextlib.ExitStack() as stack:
        state = {f"layer{number}.weight": torch.randn(elements) for number in range(tensors)}
        with CheckpointManager(folder, Policy(EverySteps(1), [KeepLast(1)]), state=lambda: state) as manager:
            manager.observe({}, step=1, epoch=0)
        reader: Any = CheckpointManager(folder)
        file = f"{folder}/{reader.last.name}"
        sides: dict[str, Callable[[], float]] = {
            "torch.load": timed(lambda: torch.load(file, weights_only=True)),
            "torch.load(mmap), each byte": timed(lambda: torch.load(file, mmap=True, weights_only=True), reads=True),
            "torch-checkpointer": timed(lambda: reader.restore().state),
            "torch-checkpointer, verify='size'": timed(lambda: reader.restore(verify="size").state),
            "torch-checkpointer, mmap=True": timed(lambda: reader.restore(mmap=True).state),
        }
        if before:
            other = Before(os.path.abspath(before), os.path.abspath(folder))
            stack.callback(other.close)
            sides["before"] = lambda: other.restore("read")
            sides["before, mmap=True"] = lambda: other.restore("mmap")
        with contextlib.suppress(ImportError):
            from safetensors.torch import load_file, save_file

            flat: Any = {"state": lambda: state, "format": "safetensors"}
            with CheckpointManager(f"{folder}/flat", Policy(EverySteps(1), [KeepLast(1)]), **flat) as manager:
                manager.observe({}, step=1, epoch=0)
            other_reader: Any = CheckpointManager(f"{folder}/flat")
            save_file(state, f"{folder}/safetensors")
            sides["safetensors, each byte"] = timed(lambda: load_file(f"{folder}/safetensors"), reads=True)
            sides["safetensors, copied"] = timed(
                lambda: {name: tensor.clone() for name, tensor in load_file(f"{folder}/safetensors").items()}
            )
            sides["torch-checkpointer, safetensors"] = timed(lambda: other_reader.restore().state)
            sides["torch-checkpointer, safetensors, mmap=True"] = timed(lambda: other_reader.restore(mmap=True).state)
        times: dict[str, list[float]] = {who: [] for who in sides}
        for turn in range(repeats + 1):
            for who in list(sides)[:: 1 if turn % 2 else -1]:
                took = sides[who]()
                if turn:
                    times[who].append(took)
    took_s = {who: statistics.median(values) for who, values in times.items()}
    load, each = took_s["torch.load"], took_s["torch.load(mmap), each byte"]
    rows = [(who, f"{t:.3f} s", f"{t / load:.2f} x", f"{t / each:.2f} x") for who, t in took_s.items()]
    print(f"{tensors} tensors of {elements * 4} bytes, torch {torch.__version__}, {os.cpu_count()} cores")
    show(rows, ("who", "takes", "to torch.load", "to each byte"))


def main() -> None:
    """Measure a state of few large tensors, and one of many small ones."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--small", type=int, default=20_000, help="number of small tensors; 0 leaves them out")
    parser.add_argument("--before", default="", help="checkout of another build")
    options = parser.parse_args()
    measure(64, options.megabytes * 2**18 // 64, options.repeats, options.before)
    if options.small:
        measure(options.small, 1000, options.repeats, options.before)


if __name__ == "__main__":
    main()
