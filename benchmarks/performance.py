"""One table of what a save costs, beside what a user would pick instead: ``python benchmarks/performance.py``.

All sides of a row are measured in one process on one disk, interleaved; medians are printed, and ratios to the first
column. What is not installed is said so. Timings on a busy machine are noisy; nothing here is a test.
"""

from __future__ import annotations

import argparse
import contextlib
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

import torch
from directories import records_of
from table import show

from checkpointer import Budget, CheckpointManager, EverySteps, KeepAll, KeepBest, KeepLast, Policy

HEAD = ("measure", "who", "takes", "beside", "ratio", "goal")
Row = tuple[str, str, str, str, str, str]
EACH = Policy(EverySteps(1), [KeepLast(1)])
State = dict[str, torch.Tensor]


def state_of(megabytes: int, tensors: int = 64) -> State:
    """Return a state of so many tensors."""
    return {f"layer{i}.weight": torch.randn(megabytes * 2**18 // tensors) for i in range(tensors)}


def interleaved(sides: dict[str, Callable[[], float | None]], repeats: int) -> dict[str, float]:
    """Return the median of what each side returns (seconds), after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(repeats + 1):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            took = sides[name]()
            if number and took is not None:
                times[name].append(took)
    return {name: statistics.median(took) for name, took in times.items() if took}


def timed(call: Callable[[], object]) -> float:
    """Return how long a call takes (seconds)."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def rows_of(
    measure: str, took: dict[str, float], beside: str, goal: str, *, scale: float = 1, unit: str = "s"
) -> list[Row]:
    """Return a row for each side, with its ratio to ``beside``."""
    base = took[beside]
    return [
        (measure if i == 0 else "", who, f"{t * scale:.3f} {unit}", beside, f"{t / base:.2f} x", goal if i == 0 else "")
        for i, (who, t) in enumerate(took.items())
    ]


# The peers. Each may be missing.


class Peers:
    """What there is beside us, each as calls that take a state and a path."""

    def __init__(self) -> None:
        self.missing: list[str] = []
        self.background: dict[str, tuple[Callable[[State, str], object], Callable[[], object]]] = {}
        """Begin a save; wait for it."""
        self.blocking: dict[str, Callable[[State, str], object]] = {}
        for find in (self._dcp, self._lightning, self._orbax, self._safetensors):
            try:
                find()
            except ImportError as error:
                self.missing.append(str(error))
        for name in ("torch_checkpointing",):
            try:
                __import__(name)
            except ImportError as error:
                self.missing.append(str(error))

    def _dcp(self) -> None:
        import torch.distributed as dist
        import torch.distributed.checkpoint as dcp
        import torch.distributed.checkpoint.state_dict_saver

        if not dist.is_initialized():
            dist.init_process_group("gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        stager = DefaultStager(StagingOptions(False, False, False, False))
        futures: list[Any] = []

        def begin(state: State, path: str) -> None:
            answer = dcp.state_dict_saver.async_save(state, checkpoint_id=path, async_stager=stager)
            futures.append(getattr(answer, "upload_completion", answer))

        self.background["DCP async_save"] = begin, lambda: futures.pop().result()

    def _lightning(self) -> None:
        from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

        plugins: list[Any] = []

        def begin(state: State, path: str) -> None:
            plugins.append(AsyncCheckpointIO(TorchCheckpointIO()))
            plugins[-1].save_checkpoint(state, path)

        self.background["Lightning AsyncCheckpointIO"] = begin, lambda: plugins.pop().teardown()
        self.blocking["Lightning (no fsync)"] = lambda state, path: TorchCheckpointIO().save_checkpoint(state, path)

    def _orbax(self) -> None:
        import logging

        import orbax.checkpoint as ocp

        logging.getLogger("absl").setLevel(logging.ERROR)
        behind = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        blocking = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())

        def arrays(state: State) -> dict[str, Any]:
            return {name: tensor.numpy() for name, tensor in state.items()}

        def begin(state: State, path: str) -> None:
            behind.save(os.path.abspath(path), args=ocp.args.PyTreeSave(arrays(state)))

        self.background["orbax async"] = begin, behind.wait_until_finished
        self.blocking["orbax"] = lambda state, path: blocking.save(
            os.path.abspath(path), args=ocp.args.PyTreeSave(arrays(state))
        )

    def _safetensors(self) -> None:
        from safetensors.torch import save_file

        def save(state: State, path: str) -> None:
            save_file(state, path)
            sync(path)

        self.blocking["safetensors + fsync"] = save


def sync(path: str) -> None:
    """Make a file durable."""
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


def drop(path: str) -> None:
    """Remove a file or folder."""
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.exists(path):
        os.unlink(path)


@contextlib.contextmanager
def folder() -> Iterator[str]:
    """Return a folder on the disk of the working directory."""
    with tempfile.TemporaryDirectory(dir=".") as path:
        yield path


class Ours:
    """Our manager, saving one step after the other."""

    def __init__(self, where: str, state: State, **options: Any) -> None:
        self.step = 0
        self.manager = CheckpointManager(where, EACH, state=lambda: state, **options)

    def save(self) -> None:
        self.step += 1
        self.manager.observe({}, step=self.step, epoch=0, epoch_end=False)


# The measures


def observe_not_due() -> list[Row]:
    manager = CheckpointManager(None, Policy(EverySteps(10**9), [KeepLast(1)]), state=dict)
    sides: dict[str, Callable[[int], object]] = {
        "torch-checkpointer": lambda n: manager.observe({}, n, 0, epoch_end=False)
    }
    with contextlib.suppress(ImportError):
        from run import _lightning_hook

        if (hook := _lightning_hook()) is not None:
            sides["Lightning hook"] = hook
    with contextlib.suppress(ImportError):
        import orbax.checkpoint as ocp

        options = ocp.CheckpointManagerOptions(save_interval_steps=10**9)
        orbax = ocp.CheckpointManager(tempfile.mkdtemp(), options=options)
        orbax.should_save(0)
        sides["orbax should_save"] = lambda n: orbax.should_save(n)
    with contextlib.suppress(ImportError):
        from transformers import TrainerControl, TrainerState, TrainingArguments
        from transformers.trainer_callback import DefaultFlowCallback

        arguments = TrainingArguments(
            output_dir=tempfile.mkdtemp(), save_strategy="steps", save_steps=10**9, logging_strategy="no", report_to=[]
        )
        flow, state, control = DefaultFlowCallback(), TrainerState(max_steps=10**10), TrainerControl()
        state.save_steps = 10**9

        def flow_step(n: int) -> None:
            state.global_step = n
            flow.on_step_end(arguments, state, control)

        sides["HF flow callback"] = flow_step
    with contextlib.suppress(ImportError):
        from ignite.engine import Engine, Events

        engine: Any = Engine(lambda engine, batch: None)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=10**9), lambda engine: None)

        def fire(n: int) -> None:
            engine.state.iteration = n
            engine.fire_event(Events.ITERATION_COMPLETED)

        sides["ignite event"] = fire
    count = 20_000
    numbers = dict.fromkeys(sides, 0)

    def calls(name: str) -> float:
        call, first = sides[name], numbers[name] + 1
        numbers[name] += count
        start = time.perf_counter()
        for n in range(first, first + count):
            call(n)
        return (time.perf_counter() - start) / count

    took = interleaved({name: (lambda name=name: calls(name)) for name in sides}, 7)  # type: ignore[misc]
    return rows_of("observe when nothing is due", took, "torch-checkpointer", "<= 1 us", scale=1e6, unit="us")


def blocked(state: State, peers: Peers, repeats: int) -> list[Row]:
    buffers = {name: torch.empty_like(tensor) for name, tensor in state.items()}

    def copy() -> None:
        for name, tensor in state.items():
            buffers[name].copy_(tensor)

    with folder() as path:
        ours = Ours(f"{path}/ours", state, background="wait")
        sides: dict[str, Callable[[], float | None]] = {"copy into warm buffers": lambda: timed(copy)}
        sides["clone"] = lambda: timed(lambda: {name: tensor.clone() for name, tensor in state.items()})

        def our_side() -> float:
            took = timed(ours.save)
            ours.manager.wait()
            return took

        sides["torch-checkpointer"] = our_side
        for name, (begin, wait) in peers.background.items():

            def side(begin: Any = begin, wait: Any = wait, name: str = name) -> float:
                target = f"{path}/{name.replace(' ', '-')}"
                drop(target)
                took = timed(lambda: begin(state, target))
                wait()
                return took

            sides[name] = side
        took = interleaved(sides, repeats)
        ours.manager.close()
    goal = "<= 1.2 x a copy"
    return rows_of("loop blocked by a background save", took, "copy into warm buffers", goal)


def durable(state: State, peers: Peers, repeats: int) -> list[Row]:
    with folder() as path:
        ours = Ours(f"{path}/ours", state)

        def raw() -> float:
            target = f"{path}/raw-new"

            def write() -> None:
                with open(target, "wb", buffering=0) as stream:
                    for tensor in state.values():
                        view = memoryview(tensor.numpy().data).cast("B")
                        while len(view):
                            view = view[stream.write(view) :]
                    os.fsync(stream.fileno())
                os.replace(target, f"{path}/raw")

            os.sync()
            return timed(write)

        def torch_save() -> float:
            os.sync()

            def save() -> None:
                torch.save(state, f"{path}/torch-new")
                sync(f"{path}/torch-new")
                os.replace(f"{path}/torch-new", f"{path}/torch")

            return timed(save)

        def our_side() -> float:
            os.sync()
            return timed(ours.save)

        sides: dict[str, Callable[[], float | None]] = {
            "write + fsync": raw, "torch-checkpointer": our_side, "torch.save + fsync": torch_save,
        }  # fmt: skip
        for name, save in peers.blocking.items():

            def side(save: Any = save, name: str = name) -> float:
                target = f"{path}/{name.split()[0]}"
                drop(target)
                os.sync()
                return timed(lambda: save(state, target))

            sides[name] = side
        took = interleaved(sides, repeats)
        ours.manager.close()
    return rows_of("blocking save to durable", took, "write + fsync", "<= 1.1 x")


def bytes_written() -> list[Row]:
    """Thirty saves under "best three and last", in bytes given to write calls per payload byte."""
    state = state_of(8, 4)
    size = sum(tensor.nbytes for tensor in state.values())
    losses = [1 / n for n in range(1, 31)]  # Each is the best so far, so that each side saves thirty times.
    took: dict[str, float] = {}
    with folder() as path:
        policy = Policy(EverySteps(1), [KeepBest(3, "loss", mode="min")], last="copy")
        before = _written()
        with CheckpointManager(f"{path}/ours", policy, state=lambda: state) as manager:
            saves = sum(
                bool(manager.observe({"loss": loss}, step=n, epoch=0, epoch_end=False))
                for n, loss in enumerate(losses, 1)
            )
        took["torch-checkpointer"] = (_written() - before) / size / saves
        with contextlib.suppress(ImportError):
            took["Lightning"] = _lightning_bytes(f"{path}/lightning", losses) / size / 30
        with contextlib.suppress(ImportError):
            took["ignite"] = _ignite_bytes(f"{path}/ignite", state, losses) / size / 30
    return [
        (
            "bytes of 30 saves, best 3 + last" if not i else "",
            who,
            f"{t:.2f} x",
            "payload",
            f"{t:.2f} x",
            "" if i else "1.0 x",
        )
        for i, (who, t) in enumerate(took.items())
    ]


def _written() -> int:
    text = Path("/proc/self/io").read_text()
    return int(text.split("wchar:")[1].split()[0])


def _lightning_bytes(where: str, losses: list[float]) -> int:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(8 * 2**18))

        def training_step(self, batch: Any, index: int) -> Any:
            loss = self.w[0] * 0
            self.log("loss", losses[self.current_epoch])
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    callback = ModelCheckpoint(where, monitor="loss", save_top_k=3, save_last=True, save_on_train_epoch_end=True)
    trainer = pl.Trainer(
        max_epochs=30, logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        callbacks=[callback], log_every_n_steps=1,
    )  # fmt: skip
    before = _written()
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(1, 1))))
    return _written() - before


def _ignite_bytes(where: str, state: State, losses: list[float]) -> int:
    from ignite.engine import Engine
    from ignite.handlers import ModelCheckpoint

    model = torch.nn.ParameterList(state.values())
    engine: Any = Engine(lambda engine, batch: None)
    best = ModelCheckpoint(
        where, "best", n_saved=3, score_function=lambda engine: -engine.state.metrics["loss"], create_dir=True,
        require_empty=False,
    )  # fmt: skip
    last = ModelCheckpoint(where, "last", n_saved=1, create_dir=True, require_empty=False)
    before = _written()
    for n, loss in enumerate(losses, 1):
        engine.state.iteration = n
        engine.state.metrics = {"loss": loss}
        best(engine, {"model": model})
        last(engine, {"model": model})
    return _written() - before


def throughput(state: State, peers: Peers, repeats: int, threads: int) -> list[Row]:
    """Training steps per second while one save is under way, beside none; stops at the end of the save."""
    torch.set_num_threads(threads)
    net = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Linear(512, 512))
    batch = torch.randn(64, 512)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        net(batch).square().mean().backward()
        optimizer.step()

    def rate(going: Callable[[], bool]) -> float | None:
        start, count = time.perf_counter(), 0
        while going():
            step()
            count += 1
        return (time.perf_counter() - start) / count if count > 10 else None

    def while_waiting(wait: Callable[[], object]) -> float | None:
        # The save's own end, not a thread that asks for it, is what counts.
        waiter = threading.Thread(target=wait)
        waiter.start()
        took = rate(waiter.is_alive)
        waiter.join()
        return took

    with folder() as path:
        ours = Ours(f"{path}/ours", state, background="wait")

        def undisturbed() -> float | None:
            end = time.perf_counter() + 2
            return rate(lambda: time.perf_counter() < end)

        def our_side() -> float | None:
            ours.save()
            took = while_waiting(ours.manager._executor.settle)
            ours.manager.wait()
            return took

        sides: dict[str, Callable[[], float | None]] = {"undisturbed": undisturbed, "torch-checkpointer": our_side}
        for name, (begin, wait) in peers.background.items():

            def side(begin: Any = begin, wait: Any = wait, name: str = name) -> float | None:
                target = f"{path}/{name.replace(' ', '-')}"
                drop(target)
                begin(state, target)
                return while_waiting(wait)

            sides[name] = side
        took = interleaved(sides, repeats)
        ours.manager.close()
    torch.set_num_threads(os.cpu_count() or 1)
    base = took["undisturbed"]
    what = f"training speed during a save, {threads} thread{'s' * (threads > 1)}"
    return [
        ("" if i else what, who, f"{1 / t:.0f} steps/s", "undisturbed", f"{base / t:.0%}", "" if i else ">= 90 %")
        for i, (who, t) in enumerate(took.items())
    ]


def restoring(state: State, repeats: int) -> list[Row]:
    with folder() as path:
        ours = Ours(f"{path}/ours", state)
        ours.save()
        ours.manager.close()
        assert ours.manager.last is not None
        file = f"{path}/ours/{ours.manager.last.name}"
        reader = CheckpointManager(f"{path}/ours")

        def touched(load: Callable[[], Any]) -> Callable[[], float | None]:
            return lambda: timed(lambda: [tensor.view(torch.uint8)[::4096].sum() for tensor in load().values()])

        def summed(load: Callable[[], Any]) -> Callable[[], float | None]:
            return lambda: timed(lambda: [tensor.view(torch.int64).sum() for tensor in load().values()])

        def mapped() -> Any:
            return torch.load(file, mmap=True, weights_only=True)

        sides = {
            "torch.load(mmap), each page": touched(mapped),
            "torch.load(mmap), each byte": summed(mapped),
            "torch-checkpointer, mmap=True": touched(lambda: reader.restore(mmap=True).state),  # type: ignore[union-attr]
            "torch-checkpointer": touched(lambda: reader.restore().state),  # type: ignore[union-attr]
            "torch-checkpointer, verify='size'": touched(lambda: reader.restore(verify="size").state),  # type: ignore[union-attr]
            "torch.load": touched(lambda: torch.load(file, weights_only=True)),
        }
        with contextlib.suppress(ImportError):
            from safetensors.torch import load_file, save_file

            save_file(state, f"{path}/safetensors")
            sides["safetensors"] = touched(lambda: load_file(f"{path}/safetensors"))
        with contextlib.suppress(ImportError):
            import orbax.checkpoint as ocp

            orbax = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
            arrays = {name: tensor.numpy() for name, tensor in state.items()}
            orbax.save(os.path.abspath(f"{path}/orbax"), args=ocp.args.PyTreeSave(arrays))

            def load() -> float:
                kinds = {name: ocp.RestoreArgs(restore_type=type(array)) for name, array in arrays.items()}
                arguments = ocp.args.PyTreeRestore(restore_args=kinds)
                return timed(lambda: orbax.restore(os.path.abspath(f"{path}/orbax"), args=arguments))

            sides["orbax"] = load
        took = interleaved(sides, repeats)
    return rows_of("verified restore", took, "torch.load(mmap), each page", "<= 1.3 x")


_MEMORY = """
import sys, tempfile, warnings
from pathlib import Path
warnings.simplefilter("ignore")
sys.path.insert(0, {here!r})
import torch
from performance import Ours, Peers, drop, state_of
size, who = {size}, {who!r}
with tempfile.TemporaryDirectory(dir=".") as path:
    small, state = state_of(1, 4), state_of(size)
    peers = Peers()
    def ours(state, target):
        manager = Ours(target, state, background="wait")
        manager.save(); manager.manager.wait(); manager.save(); manager.manager.close()
    def theirs(state, target):
        begin, wait = peers.background[who]
        begin(state, target); wait(); drop(target); begin(state, target); wait()
    def plain(state, target):
        torch.save(state, target)
    run = {{"torch-checkpointer": ours, "torch.save": plain}}.get(who, theirs)
    run(small, path + "/small")
    Path("/proc/self/clear_refs").write_text("5")
    peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    before = peak()
    run(state, path + "/large")
    print("peak", peak() - before)
"""


def memory(megabytes: int, peers: Peers) -> list[Row]:
    """Peak memory that two background saves add, each in a process of its own."""
    rows: list[Row] = []
    for who in ("torch-checkpointer", *peers.background, "torch.save"):
        code = _MEMORY.format(here=str(Path(__file__).parent), size=megabytes, who=who)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        found = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("peak")]
        extra = f"{float(found[0]):.0f} MB" if found else "failed"
        ratio = f"{float(found[0]) / megabytes:.2f} x" if found else "-"
        first = not rows
        rows.append(
            (
                "extra memory" if first else "",
                who,
                extra,
                f"state, {megabytes} MB",
                ratio,
                "1 x + 64 MB" if first else "",
            )
        )
    return rows


MANY_KEPT: dict[str, list[Any]] = {
    "everything": [KeepAll()],
    "two ranked rules and a budget": [
        KeepBest(10**9, "val_loss", mode="min"),
        KeepBest(3, "acc", mode="max"),
        Budget(bytes=10**12),
    ],
}
"""Rules under which very many live."""


def with_many(counts: Sequence[int]) -> list[Row]:
    """What a quiet step, a save and opening cost with so many checkpoints on record."""
    rows = []
    for kept in MANY_KEPT:
        took = {count: measured_with(count, Policy(EverySteps(1), MANY_KEPT[kept])) for count in counts}
        base = took[counts[0]][1]
        for count, (quiet, saved, opened) in took.items():
            text = f"step {quiet * 1e6:.2f} us, save {saved * 1e3:.1f} ms of CPU"
            more = f"{(saved - base) * 1e3:+.1f} ms"
            goal = {1000: "<= +5 ms", 10_000: "<= +100 ms"}.get(count, "")
            rows.append((f"with {count} checkpoints, {kept}", text, f"open {opened:.2f} s", "10", more, goal))
    return rows


def measured_with(count: int, policy: Policy) -> tuple[float, float, float]:
    """Return seconds of a quiet step, of the processor's time for a save, and of opening, with so many on record."""
    with folder() as path:
        records = Path(path, ".checkpointer", "records")
        records.mkdir(parents=True)
        for name, record in records_of(count):
            (records / f"{name}.json").write_bytes(record)
            Path(path, name).touch()
        CheckpointManager(path, policy, state=dict, run="bench").close()  # Writes the index.
        opened = timed(lambda: CheckpointManager(path, policy, run="bench"))
        with CheckpointManager(path, policy, state=dict, run="bench") as manager:

            def save(n: int) -> float:
                metrics = {"val_loss": 1 / (n % 5 + 1), "acc": n}
                start = time.thread_time()  # What the disk takes is the same however many there are.
                manager.observe(metrics, count + n, 0, epoch_end=False)
                return time.thread_time() - start

            saved = statistics.median([save(n) for n in range(1, 23)])
        with CheckpointManager(path, Policy(EverySteps(10**9), [KeepAll()]), state=dict, run="bench") as manager:
            steps = range(count + 31, count + 10_031)
            manager.observe({}, count + 30, 0, epoch_end=False)
            quiet = timed(lambda: [manager.observe({}, n, 0, epoch_end=False) for n in steps])
    return quiet / 10_000, saved, opened


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--checkpoints", type=int, nargs="*", default=[10, 1000, 10_000])
    parser.add_argument("--only", nargs="*", help="names of measures; all without it")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    peers = Peers()
    state = state_of(arguments.megabytes)
    rows: list[Row] = []
    measures: dict[str, Callable[[], list[Row]]] = {
        "observe": observe_not_due,
        "blocked": lambda: blocked(state, peers, arguments.repeats),
        "durable": lambda: durable(state, peers, arguments.repeats),
        "bytes": bytes_written,
        "one-thread": lambda: throughput(state, peers, arguments.repeats, 1),
        "all-threads": lambda: throughput(state, peers, arguments.repeats, os.cpu_count() or 1),
        "restore": lambda: restoring(state, arguments.repeats),
        "memory": lambda: memory(min(512, arguments.megabytes), peers),
        "many": lambda: with_many(arguments.checkpoints),
    }
    if unknown := set(arguments.only or ()) - measures.keys():
        parser.error(f"no measure {', '.join(sorted(unknown))}; there are {', '.join(measures)}")
    for name in arguments.only or measures:
        measure = measures[name]
        rows += (new := measure())
        for row in new:
            print(" | ".join(row), file=sys.stderr)
        print(f"{len(rows)} rows, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    show(rows, HEAD)
    for missing in peers.missing:
        print("not installed:", missing)


if __name__ == "__main__":
    main()
