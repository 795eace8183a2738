"""SLURM's signal before it requeues a job: Lightning saves at the end of the batch, and goes on from that by itself."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from checkpointer_lightning import CheckpointCallback
from tiny import Model, files, fit, quiet, step_of, together

from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy

pytestmark = [pytest.mark.slow, quiet]

POLICY = Policy(EverySteps(2), [KeepLast(1)], name="{step}", last="link")


class Preempted(Model):
    """Gets the signal in the middle of an optimizer's step, on one rank; then SLURM ends the job."""

    def __init__(self, directory: Path, rank: int) -> None:
        super().__init__()
        self.directory, self.rank = directory, rank
        self.is_stepping = False
        self.log_of: list[Any] = []

    def optimizer_step(self, *args: Any, **kw: Any) -> None:
        self.is_stepping = True
        if self.global_step == 4 and self.rank == self.global_rank and not files(self.directory / "root"):
            os.kill(os.getpid(), signal.SIGUSR1)
        super().optimizer_step(*args, **kw)
        self.is_stepping = False

    def on_train_start(self) -> None:
        self.log_of.append(["starts", self.global_step])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        self.log_of.append(["is stepping" if self.is_stepping else "saves", self.global_step])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Both ranks know of the signal within a second; the job ends once it is requeued.
        if self.global_step >= 5 and (self.directory / "requeued").exists() and not self.log_of[0][1]:
            os.kill(os.getpid(), signal.SIGTERM)


class Writing(pl.Callback):
    """Each rank writes down what it did."""

    def write(self, module: Any, **what: Any) -> None:
        with open(module.directory / f"rank{module.global_rank}.jsonl", "a") as stream:
            stream.write(json.dumps({"log": module.log_of, **what}) + "\n")

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.write(pl_module, error=type(exception).__name__)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.write(pl_module)


@pytest.mark.parametrize("size", [1, 2], ids=["one rank", "two ranks"])
def test_78_the_signal_is_acted_on_at_the_end_of_a_batch_by_all_and_the_job_goes_on_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Never within a step; nothing of ours is saved a second time for it, and the next run of the job takes it up."""
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin/scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    scontrol.chmod(0o755)
    slurm = {"NTASKS": size, "NTASKS_PER_NODE": size, "JOB_ID": 4242, "NNODES": 1, "NODEID": 0, "JOB_NAME": "digits"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    kind: dict[str, Any] = {"strategy": "ddp", "devices": size} if size > 1 else {}

    def work(rank: int) -> None:
        os.environ.update(SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank))
        callbacks = [Writing(), CheckpointCallback(tmp_path / "run", POLICY)]
        model = Preempted(tmp_path, size - 1)
        saved = tmp_path / "root/hpc_ckpt_1.ckpt"
        steps = step_of(saved) // 2 * 2 + 4 if saved.exists() else -1
        options = {"default_root_dir": tmp_path / "root", "max_epochs": -1, "max_steps": steps, "limit_val_batches": 0}
        fit(callbacks, model=model, **options, **kind)

    for _ in range(2):
        together(*[lambda rank=rank: work(rank) for rank in range(size)])
    runs = [[json.loads(line) for line in (tmp_path / f"rank{rank}.jsonl").open()] for rank in range(size)]
    assert runs[0] == runs[-1]
    first, second = runs[0]
    assert "requeue 4242\n" == (tmp_path / "requeued").read_text()
    assert ["hpc_ckpt_1.ckpt"] == [name for name in files(tmp_path / "root") if name.endswith(".ckpt")]
    step = step_of(tmp_path / "root/hpc_ckpt_1.ckpt")
    assert step >= 5
    assert ["saves", step] in first["log"]
    assert "is stepping" not in {what for what, _ in [*first["log"], *second["log"]]}
    # The first job is ended by SIGTERM, without a rescue, because the next job continues from Lightning's file.
    assert "SIGTERMException" == first["error"]
    assert ["starts", step] == second["log"][0]
    end = step // 2 * 2 + 4
    assert end == step_of(tmp_path / "run/last.ckpt")
    manager = CheckpointManager(tmp_path / "run")
    assert [end] == [record.step for record in manager.records]
    # What the first job saved between SLURM's signal and its end is another timeline now.
    abandoned = manager.session.manifest.abandoned
    assert all(record.step > step and record.kind == "regular" for record in abandoned)
    assert sorted(["last.ckpt", *(record.name for record in (*manager.records, *abandoned))]) == files(tmp_path / "run")
