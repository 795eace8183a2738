"""Trainings of two ranks over gloo. Each rank is a fork of one process that has imported everything.

It prints a line of JSON for each training: how each rank ended, and its result.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hf_tiny import At, Text, folders, make_trainer
from transformers import TrainerCallback

from checkpointer import CheckpointManager, EverySeconds, EverySteps, KeepBest, KeepLast, Policy
from support.kill_hf import resumed
from support.servers.processes import free_ports

POLICY = Policy(EverySteps(3), [KeepBest(1, "eval_loss", mode="min"), KeepLast(2)], last="link", best="link")
WORLD = 2
DEAD = 9


def in_ranks(work: Callable[[int], dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Run ``work`` on each rank, and return its results, exit statuses and durations."""
    [port], began = free_ports(1), time.monotonic()
    pids = {}
    for rank in range(WORLD):
        pid = os.fork()
        if not pid:
            _be(rank, port, work, folder)
        pids[pid] = rank
    results: list[dict[str, Any]] = [{} for _ in range(WORLD)]
    while pids:
        pid, status = os.wait()
        rank = pids.pop(pid)
        report = folder / f"{rank}.json"
        result = json.loads(report.read_text()) if report.exists() else {}
        report.unlink(missing_ok=True)
        results[rank] = {**result, "status": os.waitstatus_to_exitcode(status), "took": time.monotonic() - began}
        if results[rank]["status"] == DEAD:
            for other in pids:  # A launcher does the same once a rank is dead.
                os.kill(other, signal.SIGKILL)
    return results


def _be(rank: int, port: int, work: Callable[[int], dict[str, Any]], folder: Path) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(WORLD),
        LOCAL_WORLD_SIZE=str(WORLD),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    warnings.simplefilter("ignore")
    status = 1
    try:
        (folder / f"{rank}.json").write_text(json.dumps(work(rank)))
        status = 0
    except BaseException as error:
        (folder / f"{rank}.json").write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        if not isinstance(error, ZeroDivisionError):
            traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def train(
    directory: Path, *callbacks: TrainerCallback, policy: Policy | None = POLICY, **changes: Any
) -> dict[str, Any]:
    """Train from the newest checkpoint, and return the result."""
    trainer = make_trainer(
        directory,
        policy,
        callbacks=callbacks,
        per_device_train_batch_size=2,
        ddp_backend="gloo",
        eval_steps=3,
        **changes,
    )
    result, state = resumed(trainer, directory), trainer.state
    best = [state.best_global_step, state.best_model_checkpoint, state.best_metric]
    return {**result, "step": state.global_step, "best": best}


class SlowOrDead(TrainerCallback):
    """Lets rank 1 write its random state late, or die before."""

    def __init__(self, rank: int, *, dies_at: int = -1) -> None:
        self.rank, self.dies_at, self.save = rank, dies_at, torch.save

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.rank == 1:
            torch.save = lambda *args, **kwargs: self.late(state.global_step, *args, **kwargs)

    def late(self, step: int, *args: Any, **kwargs: Any) -> None:
        time.sleep(0.3)
        if step == self.dies_at:
            # Rank 0 has finished everything that does not depend on this rank.
            os._exit(DEAD)
        self.save(*args, **kwargs)


class InEvaluation(TrainerCallback):
    """Sends a rank a signal after the second batch of the evaluation at a step."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step, self.batches = rank, step, 0

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.rank == 1 and state.global_step == self.step:
            self.batches += 1
            if self.batches == 2:
                os.kill(os.getpid(), signal.SIGTERM)


def raise_it() -> None:
    """Raise as a failing training does."""
    raise ZeroDivisionError("on one rank")


def main(folder: str, how: str) -> None:
    base, attached = Path(folder), how == "attached"

    def run(name: str, directory: str, work: Callable[[int, Path], dict[str, Any]]) -> None:
        where = base / directory
        ranks = in_ranks(lambda rank: work(rank, where), base)
        records = CheckpointManager(where).records if where.is_dir() else ()
        kept = {r.name: [r.kind, r.step] for r in records}
        unmeasured = [r.name for r in records if "eval_loss" not in r.metrics]
        states = {p.parent.name for p in where.glob("checkpoint-*/rng_state_1.pth")}
        line = {"name": name, "ranks": ranks, "records": kept, "rank 1": sorted(states), "folders": folders(where)}
        line["unmeasured"] = unmeasured
        print(json.dumps(line), flush=True)

    def plain(rank: int, where: Path) -> dict[str, Any]:
        return train(where, attached=attached)

    run("unbroken", "unbroken", plain)
    run("slow", "slow", lambda rank, where: train(where, SlowOrDead(rank), attached=attached))
    run("dies", "dies", lambda rank, where: train(where, SlowOrDead(rank, dies_at=6), attached=attached))
    run("resumes", "dies", plain)
    if not attached:
        policy = Policy(EverySeconds(1e-6), [KeepLast(1)])
        run("time", "time", lambda rank, where: train(where, policy=policy))
        return

    def alone(rank: int, act: Callable[[], Any]) -> At:
        return At(4, act if rank == 1 else int)

    term = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    run("signal", "signal", lambda rank, where: train(where, alone(rank, term), attached=True))
    run("after the signal", "signal", plain)
    long: dict[str, Any] = {"attached": True, "eval_dataset": Text(64), "per_device_eval_batch_size": 2}
    run("in evaluation", "evaluation", lambda rank, where: train(where, InEvaluation(rank, 6), **long))
    run("after the evaluation", "evaluation", lambda rank, where: train(where, **long))
    run("without", "without", lambda rank, where: train(where, alone(rank, raise_it), policy=None))
    run("exception", "exception", lambda rank, where: train(where, alone(rank, raise_it), attached=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
