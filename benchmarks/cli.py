"""Each command on a directory of 10 000 checkpoints, and on one of two checkpoints of 2 GB: time and peak memory.

Every command is a process of its own, as on a terminal; its time has the start of Python in it. This process imports no
torch, since a child's peak memory begins at its parent's. Run it with ``make bench-cli``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs
from directories import records_of
from table import show

from checkpointer import CheckpointManager, EverySteps, KeepBest, KeepLast, Policy
from checkpointer.records.record import Entry
from checkpointer.storage import LocalStorage
from checkpointer.storage.digests import digest_of

HEAD = ("command", *("time", "CPU", "peak memory") * 2)
FEW = Policy(EverySteps(1), [KeepBest(1, "val_loss", mode="min"), KeepLast(1)])
BEST = ["--by", "val_loss", "--mode", "min"]

_SMALL = """
import sys, torch
torch.save({"model": {"w": torch.ones(64)}, "step": 1, "val_loss": 0.5}, sys.argv[1])
"""
_LARGE = """
import sys, torch
from checkpointer import CheckpointManager, EverySteps, KeepAll, Policy
floats = int(float(sys.argv[2]) * 1e9) // 4 // 16
state = {key: {f"layer{i}": torch.randn(floats) for i in range(8)} for key in ("model", "optimizer")}
with CheckpointManager(sys.argv[1], Policy(EverySteps(1), [KeepAll()]), state=lambda: state) as manager:
    for step in (1, 2):
        manager.observe({"val_loss": 1 / step}, step=step, epoch=0, epoch_end=False)
        state["model"]["layer0"] += 1
"""


@attrs.frozen
class Taken:
    """What a command took."""

    seconds: float
    cpu_seconds: float
    """Of user and system: what a busy machine does not change."""
    megabytes: float


def run(*argv: object) -> Taken:
    """Run one command, and fail if it does, unless it says that it found something."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "checkpointer.cli", *map(str, argv)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode in (0, 1), (argv, process.returncode)
    return Taken(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000)


def many(folder: Path, count: int) -> Path:
    """Make a directory of so many checkpoints, in a process of its own: what it takes must not count for the others."""
    subprocess.run([sys.executable, __file__, "--make", str(folder), "--records", str(count)], check=True)
    return folder / "many"


def make_many(folder: Path, count: int) -> None:
    """Make them: one small payload under all the names."""
    records = folder / "many" / ".checkpointer" / "records"
    records.mkdir(parents=True)
    payload = folder / "payload"
    subprocess.run([sys.executable, "-c", _SMALL, str(payload)], check=True)
    found = digest_of(LocalStorage(folder, ""), "payload", "xxh3-128")
    assert found is not None
    for name, data in records_of(count):
        record = attrs.evolve(Entry.from_json(data, name).record, size=found[0], digest=found[1])
        (records / f"{name}.json").write_bytes(Entry(record=record).to_json())
        _share(payload, folder / "many" / name)
    with CheckpointManager(folder / "many", Policy(EverySteps(1), [KeepLast(1)]), state=dict):
        pass  # Like the writer of a real run, it leaves an index.


def _share(payload: Path, path: Path) -> None:
    try:
        os.link(payload, path)
    except OSError:  # A file has only so many names.
        shutil.copyfile(payload, payload.with_name("again"))
        os.replace(payload.with_name("again"), payload)
        os.link(payload, path)


def bare(folder: Path, source: Path) -> Path:
    """Make a directory of the same payloads without records."""
    folder.mkdir()
    for path in source.glob("*.ckpt"):
        os.link(path, folder / path.name)
    return folder


def commands(folder: Path, run_folder: Path, names: Sequence[str]) -> Iterator[tuple[str, list[object]]]:
    """Yield each command's name and arguments; what changes the directory comes last."""
    policy = folder / "policy.yaml"
    FEW.to_yaml(policy)
    first, second = names
    yield "ls", ["ls", run_folder]
    yield "ls --json", ["ls", run_folder, "--json"]
    yield "show NAME", ["show", run_folder, second]
    yield "last", ["last", run_folder]
    yield "best", ["best", run_folder, *BEST]
    yield "verify", ["verify", run_folder]
    yield "verify --deep", ["verify", run_folder, "--deep"]
    yield "verify --quick", ["verify", run_folder, "--quick"]
    yield "diff A B", ["diff", run_folder, first, second]
    yield "export NAME", ["export", run_folder, second, folder / "out.safetensors", "--only", "model"]
    yield "average --best 2", ["average", run_folder, "--best", 2, *BEST, "--out", folder / "out.pt", "--only", "model"]
    yield "simulate", ["simulate", run_folder, "--policy", policy]
    yield "plot", ["plot", run_folder, folder / "out.png", *BEST]
    yield "report", ["report", run_folder, folder / "out.html", *BEST]
    yield "copy", ["copy", run_folder, folder / "copy"]
    yield "copy again", ["copy", run_folder, folder / "copy"]
    yield "adopt", ["adopt", bare(folder / "bare", run_folder)]
    yield "prune", ["prune", run_folder, "--policy", policy]
    yield "prune --apply", ["prune", folder / "copy", "--policy", policy, "--apply"]
    yield "sweep", ["sweep", folder / "copy"]


def measure(folder: Path, run_folder: Path, names: Sequence[str]) -> dict[str, Taken]:
    """Run every command once, after one to warm up."""
    run("last", run_folder)
    taken = {}
    for name, argv in commands(folder, run_folder, names):
        taken[name] = run(*argv)
        print(f"{name}: {taken[name].seconds:.2f} s", file=sys.stderr)
        for path in folder.glob("out.*"):
            path.unlink()
    return taken


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make_many(arguments.make, arguments.records)
        return
    with tempfile.TemporaryDirectory(dir=".") as text:
        folder = Path(text).absolute()
        (folder / "a").mkdir()
        names = (f"epoch=0-step={arguments.records - 1}.ckpt", f"epoch=0-step={arguments.records}.ckpt")
        wide = measure(folder / "a", many(folder / "a", arguments.records), names)
        shutil.rmtree(folder / "a")
        (folder / "b").mkdir()
        large = str(folder / "b" / "run")
        subprocess.run([sys.executable, "-c", _LARGE, large, str(arguments.gigabytes)], check=True)
        deep = measure(folder / "b", Path(large), ("1", "2"))
    head = ("", f"{arguments.records} records", "", "", f"2 x {arguments.gigabytes:g} GB", "", "")
    show([HEAD, *((name, *_cells(wide[name]), *_cells(deep[name])) for name in wide)], head=head)


def _cells(taken: Taken) -> tuple[str, str, str]:
    return f"{taken.seconds:.1f} s", f"{taken.cpu_seconds:.1f} s", f"{taken.megabytes:.0f} MB"


if __name__ == "__main__":
    main()
