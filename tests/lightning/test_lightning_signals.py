"""Two processes (gloo): signals, exceptions and clocks that only one of them has."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from checkpointer_lightning import CheckpointCallback, ModelCheckpoint
from support.gated import GatedStorage
from tiny import Model, files, fit, loader, quiet, step_of, together, trainer
from torch.utils.data import DataLoader, IterableDataset

from checkpointer import (
    AtSteps,
    CheckpointerWarning,
    CheckpointManager,
    EveryEpochs,
    EverySteps,
    KeepBest,
    KeepLast,
    Listener,
    Policy,
)

pytestmark = [pytest.mark.slow, quiet]

DDP: dict[str, Any] = {"strategy": "ddp", "devices": 2}


class Writing(pl.Callback):
    """Each rank writes down what ended its training."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        outcome = {"step": trainer.global_step, "error": type(exception).__name__}
        (self.directory / f"rank{trainer.global_rank}.json").write_text(json.dumps(outcome))


def outcomes(directory: Path) -> list[Any]:
    """Return what the ranks wrote."""
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in (0, 1)]


class Signalled(Model):
    """One rank gets a SIGTERM, in the middle of a batch."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        time.sleep(0.01)
        if self.global_step == 10 and self.global_rank == self.rank:
            os.kill(os.getpid(), signal.SIGTERM)


def train(directory: Path, *, rank: int) -> None:
    """Train until the signal comes."""
    callbacks = [Writing(directory), ModelCheckpoint(directory / "run", save_on_exception=True)]
    fit(callbacks, model=Signalled(rank), max_epochs=10_000, **DDP)


if __name__ == "__main__":  # Lightning starts the second process by running this file again.
    train(Path(sys.argv[1]), rank=int(sys.argv[2]))


def check_stopped(directory: Path) -> None:
    """Both ranks have stopped at one step, by Lightning's own exception, and that step is saved once."""
    first, second = outcomes(directory)
    assert first == second
    assert "SIGTERMException" == first["error"]
    step = first["step"]
    # At the end of an epoch the epoch's own save has taken the rescue's place.
    newest = CheckpointManager(directory / "run").records[-1]
    assert step == newest.step == step_of(directory / "run" / newest.name)
    assert "rescue: SIGTERM" == newest.reason or newest.epoch_end
    assert 1 == len([name for name in files(directory / "run") if f"step={step}." in name])


def test_a_stopped_training_waits_for_the_mirror_no_longer_than_the_grace(tmp_path: Path) -> None:
    """A mirror that never answers would hold it for ten minutes."""
    mirror = GatedStorage()
    mirror.shut()
    policy = Policy(EveryEpochs(1), [KeepLast(1)])
    callback = CheckpointCallback(tmp_path, policy, mirror=mirror, grace_s=1.0)
    began = time.monotonic()
    with pytest.warns(CheckpointerWarning, match="the mirror memory is behind"), pytest.raises(SystemExit):
        fit([callback], model=Signalled(0), max_epochs=10_000)
    assert time.monotonic() - began < 300.0
    assert files(tmp_path)


def test_a_stopped_training_waits_for_the_writer_no_longer_than_the_grace(tmp_path: Path) -> None:
    """A save that does not end would hold it until the kill; a rescue cannot begin before that save ends."""
    gate = threading.Event()

    class Holding(Listener):
        def on_saved(self, record: Any) -> None:
            gate.wait(60.0)

    policy = Policy(AtSteps(1), [KeepLast(1)])
    options: dict[str, Any] = {"background": "skip", "listeners": [Holding()]}
    callback = CheckpointCallback(tmp_path, policy, grace_s=0.5, **options)
    began = time.monotonic()
    try:
        with (
            pytest.warns(CheckpointerWarning, match=r"no rescue .* is still being written, so no rescue was begun"),
            pytest.warns(CheckpointerWarning, match=r"is still being written, and close\(\) stops waiting"),
            pytest.raises(SystemExit),
        ):
            fit([callback], model=Signalled(0), max_epochs=10_000)
        assert time.monotonic() - began < 50.0
    finally:
        gate.set()


def test_a_sigterm_of_the_launching_rank_stops_all_at_one_step_and_is_rescued_once(tmp_path: Path) -> None:
    """It is passed on to the processes that Lightning has started."""
    path = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-W", "ignore", __file__, str(tmp_path), "0"]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, timeout=300)
    check_stopped(tmp_path)


def test_a_sigterm_of_another_rank_stops_all_at_one_step_and_is_rescued_once(tmp_path: Path) -> None:
    """It is not passed on. Lightning's handler alone would mix its collective with the training's."""

    def work() -> None:
        train(tmp_path, rank=1)

    together(work, work)
    check_stopped(tmp_path)


class Uncounted(IterableDataset[Any]):
    """Gives rank 1 more batches than rank 0."""

    def __iter__(self) -> Any:
        yield from torch.ones(30 + 10 * dist.get_rank(), 2)


class Validating(Model):
    """Rank 1 gets a SIGTERM in the middle of a validation; each rank writes down how many batches it validates."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory
        self.validated = 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        time.sleep(0.005)
        self.validated += 1
        (self.directory / f"validated{self.global_rank}").write_text(str(self.validated))
        if self.validated == 3 and self.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("kind", ["counted", "uncounted"])
def test_a_sigterm_within_a_validation_stops_all_within_it_if_their_batches_are_counted(
    tmp_path: Path, kind: str
) -> None:
    """Each callback saves once, without the metrics of that validation; where ranks may differ it is finished first."""
    measured: Any = DataLoader(torch.ones(600, 2) if kind == "counted" else Uncounted())  # type: ignore[arg-type]
    policy = Policy(EverySteps(100), [KeepBest(1, "val_loss", mode="min")])
    names = ("first", "second")

    def work() -> None:
        callbacks = [Writing(tmp_path), *(CheckpointCallback(tmp_path / name, policy) for name in names)]
        training = trainer(callbacks, val_check_interval=2, num_sanity_val_steps=0, **DDP)
        training.fit(Validating(tmp_path), loader(8), measured)

    together(work, work)
    first, second = outcomes(tmp_path)
    assert {"step": 2, "error": "SIGTERMException"} == first == second
    validated = [int((tmp_path / f"validated{rank}").read_text()) for rank in (0, 1)]
    if kind == "counted":
        assert validated[0] == validated[1] < 300
    else:
        assert [30, 40] == validated
    for name in names:
        (record,) = CheckpointManager(tmp_path / name).records
        assert (2, "rescue: SIGTERM") == (record.step, record.reason)
        assert kind == "uncounted" or "val_loss" not in record.metrics
        loops = torch.load(tmp_path / name / record.name, weights_only=True)["loops"]["fit_loop"]
        # A resume runs all of a validation that was not finished.
        validated = loops["epoch_loop.val_loop.batch_progress"]["current"]["completed"]
        assert (0 if kind == "counted" else 30) == validated


class Breaking(pl.LightningModule):
    """Has no hook of its own when the state is taken: a rank alone can take it."""

    def __init__(self, *ranks: int) -> None:
        super().__init__()
        self.inner = Model()
        self.ranks = ranks

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 1 and self.global_rank in self.ranks:
            raise ZeroDivisionError("the training breaks")
        return self.inner.layer(batch).pow(2).mean()

    def configure_optimizers(self) -> Any:
        return self.inner.configure_optimizers()


class Hooked(Breaking):
    """Has a hook that may need the other ranks."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        dist.barrier()


@pytest.mark.parametrize(
    ("model", "rescued"), [(Breaking(0), True), (Hooked(0, 1), True), (Hooked(0), False)], ids=["one", "all", "hooked"]
)
def test_an_exception_is_rescued_if_no_rank_is_missing_for_it(tmp_path: Path, model: Any, rescued: bool) -> None:
    """Rank 0 alone where it has all there is to save; all together if all are there; else not, and soon."""
    callback = CheckpointCallback(tmp_path / "run", Policy(EveryEpochs(1), [KeepLast(1)]))

    def work() -> None:
        fit([Writing(tmp_path), callback], model=model, max_epochs=1, limit_val_batches=0, **DDP)

    together(work, work)
    assert (["rescue-step=1.ckpt"] if rescued else []) == files(tmp_path / "run")
    assert "ZeroDivisionError" == json.loads((tmp_path / "rank0.json").read_text())["error"]


class Uneven:
    """A clock that only rank 0 sees going."""

    now = 1000.0

    def time(self) -> float:
        if dist.is_initialized() and dist.get_rank() == 0:
            self.now += 1
        return self.now


class Taken(Model):
    """Each rank notes when its state was taken."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        with open(self.directory / f"taken{self.global_rank}", "a") as stream:
            stream.write(f"{self.global_step} ")


def test_18_and_69_rank_0s_clock_counts_and_all_ranks_take_the_state(tmp_path: Path) -> None:
    """A time trigger is due at one step on every rank, whatever their clocks say, and the state is taken by all."""
    callback: Any = ModelCheckpoint(
        tmp_path / "run", "{step}", train_time_interval=timedelta(seconds=40), save_top_k=-1
    )
    callback._clock = Uneven()

    def work() -> None:
        fit(callback, model=Taken(tmp_path), max_epochs=20, **DDP)

    together(work, work)
    taken = [(tmp_path / f"taken{rank}").read_text().split() for rank in (0, 1)]
    assert taken[0] == taken[1]
    assert {f"step={step}.ckpt" for step in taken[0]} == set(files(tmp_path / "run"))
    assert 1 <= len(taken[0]) < 20
