"""Training time that a save in the background costs, in seconds for each GB: ``python benchmarks/training.py``.

Each side runs in a process of its own, because of its threads, its memory and its versions. The processes stay and
take turns: in one round each side saves once in each setting, and all others sleep. A measurement trains undisturbed,
then with one save, then undisturbed again. *Lost* is the time from the call that begins the save until the save is
durable and `TAIL_S` have passed, minus the time that as many undisturbed steps take. Each side keeps one checkpoint:
to delete the one before is part of the save. Files that a side does not sync are synced as soon as it says that it is
done. Medians are printed. Timings on a busy machine are noisy; nothing here is a test.

*At least* is what a side would lose if nothing but arithmetic mattered. While the state is copied, the training stands
still. All other processor seconds of the save (of the whole machine, measured in one save without training) are taken
from the training if it has as many threads as there are cores; if a core is free, they need not cost anything.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from table import show

HEAD = ("training while a save is written", "who", "lost", "at least", "beside ours", "speed during it", "save takes")
UNDISTURBED_S = 0.7
"""Seconds of undisturbed training before and after each save."""
TAIL_S = 0.3
"""Seconds of training after a save that still count: the trainer may need time to be at full speed again."""
SETTINGS = tuple((kind, threads) for threads in (1, 2) for kind in ("large", "small"))
Begin = Callable[[str], Callable[[], object]]
"""Begins a save to a path that does not exist; returns the function that waits until it is complete."""


def step_of(kind: str) -> Callable[[], object]:
    """Return a training step: ``large`` ones compute without the GIL, ``small`` ones are many tiny operations."""
    import torch

    if kind == "large":
        width, depth, batch = 512, 1, 64
    else:
        width, depth, batch = 8, 12, 4
    layers = [layer for _ in range(depth) for layer in (torch.nn.Linear(width, width), torch.nn.ReLU())]
    net = torch.nn.Sequential(*layers, torch.nn.Linear(width, width))
    inputs = torch.randn(batch, width)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        net(inputs).square().mean().backward()
        optimizer.step()

    return step


def lost(step: Callable[[], object], begin: Callable[[], Callable[[], bool]]) -> dict[str, float]:
    """Return the training time that one save costs (s), the share of speed while it runs, and how long it takes (s).

    ``begin`` begins the save and returns a function that says, at once, whether the save is durable.
    """

    def seconds_each(seconds: float) -> float:
        start, count = time.perf_counter(), 0
        while (now := time.perf_counter()) < start + seconds:
            step()
            count += 1
        return (now - start) / count

    before = seconds_each(UNDISTURBED_S)
    start, count = time.perf_counter(), 0
    is_durable = begin()
    begun = time.perf_counter()
    while not is_durable():
        step()
        count += 1
    during, steps = time.perf_counter(), count
    while time.perf_counter() < during + TAIL_S:
        step()
        count += 1
    end = time.perf_counter()
    each = (before + seconds_each(UNDISTURBED_S)) / 2
    return {"lost": end - start - count * each, "share": steps * each / (during - begun), "took": during - start}


def alone(begin: Callable[[], Callable[[], bool]]) -> dict[str, float]:
    """Return what one save costs without training: processor seconds of the machine, and seconds that it blocks."""
    from perf.sides import machine_cpu_s

    before, start = machine_cpu_s(), time.perf_counter()
    is_durable = begin()
    blocked = time.perf_counter() - start
    while not is_durable():
        time.sleep(0.005)
    os.sync()
    return {"cpu": machine_cpu_s() - before, "blocked": blocked}


def at_least(cost: dict[str, float], threads: int) -> float:
    """Return the seconds that a save costs a training with so many threads by arithmetic."""
    cores = os.cpu_count() or 1
    rest = max(0.0, cost["cpu"] - cost["blocked"])
    return cost["blocked"] + (rest / cores if threads >= cores else 0.0)


# The sides


def _ours(state: Any, where: str) -> tuple[Callable[[], Callable[[], bool]], Callable[[], object]]:
    from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy

    steps = iter(range(1, 10**9))
    manager = CheckpointManager(
        where, Policy(EverySteps(1), [KeepLast(1)]), state=lambda: state, background="wait"
    )  # fmt: skip

    def begin() -> Callable[[], bool]:
        manager.observe({}, step=next(steps), epoch=0, epoch_end=False)
        # Not wait(), because a loop that trains does not wait.

        def is_durable() -> bool:
            status = manager.session.background_status
            return status is not None and not status.unfinished

        return is_durable

    return begin, manager.wait


def _dcp(kind: str) -> Callable[[Any], Begin]:
    def side(state: Any) -> Begin:
        import torch
        import torch.distributed as dist
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save

        store: Any = torch._C._distributed_c10d.HashStore()
        if kind == "process":
            os.environ.update(MASTER_ADDR="127.0.0.1", RANK="0", WORLD_SIZE="1")
            store = torch._C._distributed_c10d.TCPStore("127.0.0.1", 0, 1, is_master=True)
            os.environ["MASTER_PORT"] = str(store.port)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        stager = DefaultStager(StagingOptions(False, kind == "process", False, False))

        def begin(path: str) -> Callable[[], object]:
            answer: Any = async_save(
                state, checkpoint_id=path, async_stager=stager, async_checkpointer_type=AsyncCheckpointerType(kind)
            )
            return getattr(answer, "upload_completion", answer).result  # type: ignore[no-any-return]

        return begin

    return side


def _lightning(state: Any) -> Begin:
    from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

    def begin(path: str) -> Callable[[], object]:
        plugin = AsyncCheckpointIO(TorchCheckpointIO())
        plugin.save_checkpoint(state, path)
        return plugin.teardown  # type: ignore[no-any-return]

    return begin


def _orbax(state: Any) -> Begin:
    import logging

    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)
    checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())

    def begin(path: str) -> Callable[[], object]:
        arrays = {name: tensor.numpy() for name, tensor in state.items()}
        checkpointer.save(os.path.abspath(path), args=ocp.args.PyTreeSave(arrays))
        return checkpointer.wait_until_finished  # type: ignore[no-any-return]

    return begin


def _torch_checkpointing(state: Any) -> Begin:
    from torch_checkpointing import CheckpointManager
    from torch_checkpointing.config import AsyncCheckpointSaverConfig
    from torch_checkpointing.staging import CheckpointStagerConfig
    from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

    # Its defaults need CUDA for the staging, and a disk that takes unaligned direct writes.
    staging = CheckpointStagerConfig(use_pinned_memory=False, use_async_staging=False, use_non_blocking_copy=False)
    manager = CheckpointManager(
        CheckpointManager.Config(
            save=AsyncCheckpointSaverConfig(staging_config=staging),
            storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
        )
    )

    def begin(path: str) -> Callable[[], object]:
        future: Any = manager.save(os.path.abspath(path), {"model": state})
        return future.result  # type: ignore[no-any-return]

    return begin


PEERS: dict[str, Callable[[Any], Begin]] = {
    "DCP async_save": _dcp("thread"),
    "DCP async_save, process": _dcp("process"),
    "Lightning AsyncCheckpointIO": _lightning,
    "Orbax async": _orbax,
    "torch-checkpointing": _torch_checkpointing,
}


def _as_side(begin: Begin, where: str) -> tuple[Callable[[], Callable[[], bool]], Callable[[], object]]:
    """Give a peer an unused path for each save, sync what it has written, and delete the save before it."""
    paths = (f"{where}/{number}" for number in range(10**9))
    threads: list[threading.Thread] = []

    def complete(path: str, wait: Callable[[], object]) -> None:
        wait()
        for file in [Path(path), *Path(path).rglob("*")]:
            with open(os.open(file, os.O_RDONLY), "rb") if file.is_file() else contextlib.nullcontext() as stream:
                if stream is not None:
                    os.fsync(stream.fileno())
        for other in set(Path(where).iterdir()) - {Path(path)}:
            shutil.rmtree(other) if other.is_dir() else other.unlink()

    def begin_next() -> Callable[[], bool]:
        path = next(paths)
        threads.append(threading.Thread(target=complete, args=(path, begin(path))))
        threads[-1].start()
        return lambda: not threads[-1].is_alive()

    return begin_next, lambda: threads.pop().join()


def serve(name: str, megabytes: int, where: str) -> None:
    """Answer each request on the standard input, a setting, with what one save costs."""
    import torch

    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Some sides print.
    torch.set_num_threads(1)
    state = {f"layer{i}.weight": torch.randn(megabytes * 2**18 // 64) for i in range(64)}
    os.makedirs(where, exist_ok=True)
    try:
        side = _ours(state, where) if name not in PEERS else _as_side(PEERS[name](state), where)
        answer: Any = {}
    except Exception as error:
        answer = {"why": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), file=answers, flush=True)
    for line in sys.stdin:
        kind, threads = json.loads(line)
        torch.set_num_threads(threads)
        try:
            answer = lost(step_of(kind), side[0]) if kind else alone(side[0])
            side[1]()
        except Exception as error:
            answer = {"why": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


class Side:
    """One side, in its process. ``path`` is the root of a checkout of this project that it uses in place of ours."""

    def __init__(self, name: str, *, megabytes: int, where: str, path: str = "") -> None:
        self.name = name
        environment = dict(os.environ)
        if path:
            environment["PYTHONPATH"] = os.pathsep.join((path, f"{path}/adapters"))
        environment["OMP_NUM_THREADS"] = str(os.cpu_count())
        command = [sys.executable, __file__, "--serve", name, "--megabytes", str(megabytes), "--where", where]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.why = ""
        """Why it cannot be measured."""
        self.costs: list[dict[str, float]] = []
        """What saves without training cost."""
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None, "it is a pipe"
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"why": "its process ended"}
        self.why = self.why or answer.get("why", "")
        return answer

    def lost(self, kind: str, threads: int) -> dict[str, float] | None:
        """Measure one save; None if it failed."""
        if self.why:
            return None
        assert self._process.stdin is not None, "it is a pipe"
        os.sync()
        print(json.dumps([kind, threads]), file=self._process.stdin, flush=True)
        answer = self._answer()
        return None if self.why else answer

    def at_least(self, threads: int) -> float:
        """Return the median of what a save costs by arithmetic (s)."""
        return statistics.median(at_least(cost, threads) for cost in self.costs) if self.costs else float("nan")

    def end(self) -> None:
        """End the process."""
        assert self._process.stdin is not None, "it is a pipe"
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()


@contextlib.contextmanager
def sides_of(names: Sequence[str], megabytes: int, before: str) -> Iterator[list[Side]]:
    """Start all sides. ``before`` is a checkout of an earlier build, or empty."""
    with tempfile.TemporaryDirectory(dir=".") as where:
        sides = []
        try:
            for number, name in enumerate(names):
                path = before if name == "the build before" else ""
                sides.append(Side(name, megabytes=megabytes, where=os.path.abspath(f"{where}/{number}"), path=path))
            yield sides
        finally:
            for side in sides:
                side.end()


def measured(
    sides: Sequence[Side], rounds: int, settings: Sequence[tuple[str, int]]
) -> dict[tuple[str, int], dict[str, list[dict[str, float]]]]:
    """Return the results of all rounds but the first, which warms up, by setting and side."""
    found: Any = {setting: {side.name: [] for side in sides} for setting in settings}
    for number in range(rounds + 1):
        for side in sides:
            if number and (cost := side.lost("", 1)) is not None:
                side.costs.append(cost)
        for setting in settings if number else settings[:1]:
            for side in list(sides)[:: 1 if number % 2 else -1]:
                if (answer := side.lost(*setting)) is not None and number:
                    found[setting][side.name].append(answer)
                    print(*setting, side.name, {key: round(s, 3) for key, s in answer.items()}, file=sys.stderr)
    return found  # type: ignore[no-any-return]


def rows_of(
    found: dict[tuple[str, int], dict[str, list[dict[str, float]]]], megabytes: int, sides: Sequence[Side]
) -> list[tuple[str, ...]]:
    """Return the rows of the table: for each setting the median of each side, and its ratio to the first side."""
    rows: list[tuple[str, ...]] = []
    floors = {side.name: side.at_least for side in sides}
    per_gb = 1000 / (megabytes * 1.048576)
    for (kind, threads), by_side in found.items():
        what = f"{kind} steps, {threads} thread{'s' * (threads > 1)}"
        base: float | None = None
        for name, answers in by_side.items():
            if not answers:
                continue
            lost_s, share, took = (
                statistics.median(answer[key] for answer in answers) for key in ("lost", "share", "took")
            )
            lost_s *= per_gb
            base = lost_s if base is None else base
            least = f"{floors[name](threads) * per_gb:.3f} s/GB"
            measured = (f"{lost_s:.3f} s/GB", least, f"{lost_s / base:.2f} x", f"{share:.0%}", f"{took:.2f} s")
            rows.append((what, name, *measured))
            what = ""
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--before", default="", help="a checkout of an earlier build, to measure it too")
    parser.add_argument("--only", nargs="*", help="names of sides; all without it")
    parser.add_argument("--settings", nargs="*", help="such as small-1 or large-2; all without it")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--where", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.megabytes, arguments.where)
        return
    settings = [s for s in SETTINGS if not arguments.settings or f"{s[0]}-{s[1]}" in arguments.settings]
    names = arguments.only or ["torch-checkpointer", *["the build before"] * bool(arguments.before), *PEERS]
    with sides_of(names, arguments.megabytes, arguments.before) as sides:
        show(rows_of(measured(sides, arguments.rounds, settings), arguments.megabytes, sides), HEAD)
        for side in sides:
            if side.why:
                print(f"{side.name}: {side.why}")


if __name__ == "__main__":
    main()
