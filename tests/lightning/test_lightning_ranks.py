"""Two processes (gloo): rank 0 decides, both write and know, and one rank's exception is seen as itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpointer_lightning import CheckpointCallback, ModelCheckpoint
from tiny import Model, files, fit, quiet

from checkpointer import AnyOf, CheckpointManager, EverySeconds, EverySteps, KeepBest, KeepLast, Policy

pytestmark = [pytest.mark.slow, quiet]


class Writing(Model):
    """Each rank writes down what its callback shows."""

    def __init__(self, directory: Path, **kw: Any) -> None:
        super().__init__(**kw)
        self.directory = directory

    def on_train_end(self) -> None:
        shown: Any = self.trainer.checkpoint_callback
        written = {"best": shown.best_model_path, "last": shown.last_model_path, "score": float(shown.best_model_score)}
        (self.directory / f"rank{self.global_rank}.json").write_text(json.dumps(written))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        # Ranks measure different things: what rank 0 says counts.
        super().validation_step(batch, batch_idx)
        self.log("mine", float(self.global_rank + self.current_epoch))


@pytest.mark.parametrize(("kind", "strategy"), [("drop-in", "ddp_spawn"), ("policy", "ddp_fork")])
def test_every_rank_knows_what_rank_0_decides(tmp_path: Path, kind: str, strategy: str) -> None:
    """The same best and last on both, though their scores differ; one record per save, written by one."""
    directory = tmp_path / "run"
    callback: Any
    if kind == "drop-in":
        callback = ModelCheckpoint(directory, monitor="mine", save_last=True, save_top_k=2)
    else:
        policy = Policy(
            AnyOf(EverySteps(1), EverySeconds(0)), [KeepBest(2, "mine", mode="min"), KeepLast(1)], last="link"
        )
        callback = CheckpointCallback(directory, policy)
    training = fit(callback, model=Writing(tmp_path), strategy=strategy, devices=2, max_epochs=2)
    written = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert written[0] == written[1]
    assert 0.0 == written[0]["score"]
    assert training.checkpoint_callback is callback
    assert written[0]["best"] == callback.best_model_path
    steps = [record.step for record in CheckpointManager(directory).records]
    assert [2, 4] == steps
    assert "last.ckpt" in files(directory)


SCRIPT = """
import sys, warnings
sys.path[:0] = {path!r}
warnings.simplefilter("ignore")
from tiny import Model, fit
from checkpointer_lightning import ModelCheckpoint

class Broken(Model):
    def training_step(self, batch, batch_idx):
        if self.global_step == 1 and self.global_rank == {rank}:
            raise ZeroDivisionError("one rank breaks")
        return super().training_step(batch, batch_idx)

import time
class Timed(ModelCheckpoint):
    def on_exception(self, trainer, pl_module, exception):
        began = time.monotonic()
        super().on_exception(trainer, pl_module, exception)
        print("TOOK", time.monotonic() - began, type(exception).__name__, flush=True)

if __name__ == "__main__":
    fit(Timed({directory!r}, save_on_exception=True), model=Broken(), strategy="ddp", devices=2, max_epochs=1)
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_one_ranks_exception_is_seen_as_itself(tmp_path: Path, rank: int) -> None:
    """Nothing waits for the other rank, which will never come."""
    script = tmp_path / "broken.py"
    script.write_text(SCRIPT.format(path=sys.path, rank=rank, directory=str(tmp_path / "run")))
    found = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert 0 != found.returncode
    assert "ZeroDivisionError: one rank breaks" in found.stderr
    took = [line.split() for line in found.stdout.splitlines() if line.startswith("TOOK") and "ZeroDivision" in line]
    assert [] != took
    assert all(float(fields[1]) < 2 for fields in took)
    assert [] == files(tmp_path / "run")
