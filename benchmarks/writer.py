"""What a blocking save costs, beside another build, ``torch.save`` and plain writes: ``python benchmarks/writer.py``.

Each side runs in a process of its own, because two builds cannot be loaded into one. The sides take turns. Measured are
the seconds until the file is durable, the CPU seconds of the whole machine (the kernel's own threads write the pages
back), and the memory that the save takes. Example, with another build checked out beside it::

    git worktree add --detach /tmp/before v0.1.0
    python benchmarks/writer.py --before /tmp/before
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from table import show

HEAD = ("side", "durable after", "ratio", "CPU of the machine", "ratio", "extra memory")
_RAW_CHUNK = 4 << 20


def cpu_seconds() -> float:
    """Return the CPU seconds of all processes and of the kernel since the machine was booted."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    user, nice, system, _, _, irq, softirq = map(int, fields[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def peak_kb() -> int:
    """Return the most memory (KiB) that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# One side, in a process of its own


def ours(state: Any, where: str) -> Callable[[], object]:
    """Save with the manager of the build that this process has loaded."""
    from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy

    manager = CheckpointManager(where, Policy(EverySteps(1), [KeepLast(1)]), state=lambda: state)
    steps = iter(range(1, 1 << 30))
    return lambda: manager.observe({}, step=next(steps), epoch=0, epoch_end=False)


def torch_save(state: Any, where: str) -> Callable[[], object]:
    """Save with torch alone."""
    import torch

    def save() -> None:
        with open(f"{where}/new", "wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(f"{where}/new", f"{where}/torch")

    return save


def raw(state: Any, where: str) -> Callable[[], object]:
    """Write the same bytes, without a format."""

    def save() -> None:
        with open(f"{where}/new", "wb", buffering=0) as stream:
            for tensor in state.values():
                view = memoryview(tensor.numpy()).cast("B")
                while len(view):
                    view = view[stream.write(view[:_RAW_CHUNK]) :]
            os.fsync(stream.fileno())
        os.replace(f"{where}/new", f"{where}/raw")

    return save


SIDES: dict[str, Callable[[Any, str], Callable[[], object]]] = {
    "this build": ours,
    "the other build": ours,
    "torch.save + fsync": torch_save,
    "write + fsync": raw,
}


def serve(side: str, size: int, count: int) -> None:
    """Save once for each line of the standard input, and print what it took."""
    import torch

    state = {f"layer{i}.weight": torch.randn(size // count // 4) for i in range(count)}
    with tempfile.TemporaryDirectory(dir=".") as where:
        save = SIDES[side](state, where)
        before = peak_kb()
        for _ in sys.stdin:
            os.sync()
            cpu, start = cpu_seconds(), time.perf_counter()
            save()
            took = time.perf_counter() - start
            print(took, cpu_seconds() - cpu, (peak_kb() - before) / 1024, flush=True)


# The sides, taking turns


def begin(side: str, arguments: argparse.Namespace) -> subprocess.Popen[str]:
    """Start the process of one side."""
    here = Path(__file__).resolve().parent
    root = arguments.before if side == "the other build" else here.parent
    path = os.pathsep.join([str(root), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    command = [sys.executable, __file__, "--side", side, "--size", str(arguments.size), "--count", str(arguments.count)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )


def ask(process: subprocess.Popen[str]) -> list[float]:
    """Let a side save once; return what it took."""
    assert process.stdin is not None
    assert process.stdout is not None
    print(file=process.stdin, flush=True)
    return [float(number) for number in process.stdout.readline().split()]


def compare(arguments: argparse.Namespace) -> list[tuple[str, ...]]:
    """Return a row for each side: medians, and ratios to the last side."""
    names = [name for name in SIDES if arguments.before or name != "the other build"]
    took: dict[str, list[list[float]]] = {name: [] for name in names}
    with contextlib.ExitStack() as stack:
        processes = {name: stack.enter_context(begin(name, arguments)) for name in names}
        for number in range(arguments.repeats + 1):
            for name in names[:: 1 if number % 2 else -1]:
                figures = ask(processes[name])
                took[name] += [figures] if number else []
        for process in processes.values():
            assert process.stdin is not None
            process.stdin.close()
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in took.items()}
    time_s, cpu_s, _ = medians[names[-1]]
    return [
        (
            name,
            f"{t:.3f} s",
            f"{t / time_s:.2f} x",
            f"{cpu:.2f} s",
            f"{cpu / max(cpu_s, 0.01):.2f} x",
            f"{extra:.0f} MiB",
        )
        for name, (t, cpu, extra) in medians.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", help="folder of another build")
    parser.add_argument("--size", type=int, default=512 << 20, help="bytes")
    parser.add_argument("--count", type=int, default=64, help="tensors")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        serve(arguments.side, arguments.size, arguments.count)
        return
    show(compare(arguments), HEAD)


if __name__ == "__main__":
    main()
