"""Trainings by a `Loop`, the HF Trainer and Lightning for `support.hosts`, of one process or of several (gloo).

Rank 0 reports its steps and its weights. Each rank is a fork of this process, which has imported everything.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import transformers
import xxhash
from checkpointer_lightning import CheckpointCallback
from checkpointer_torch import Loop
from torch.utils.data import DataLoader, TensorDataset

from checkpointer import EveryEpochs, EverySteps, KeepLast, Policy
from support.host_me import serve, status_of
from support.kill_me import report
from support.servers.processes import free_ports

sys.path += [str(Path(__file__).parents[1] / name) for name in ("lightning", "transformers")]

from hf_tiny import make_trainer, weights_of
from tiny import Model, fit

torch.set_num_threads(1)

LEASE_S: Final = 1.0
BATCHES: Final = 4
"""Batches, and so steps, of an epoch in the loop and in Lightning."""
PATIENCE_S: Final = 30.0
"""Seconds that the other ranks may live on after the first one has failed."""

Gate = Callable[[int], None]


def gate_of(step: int) -> Gate:
    """Return what a training calls before each step: rank 0 waits at ``step`` for a line on stdin; 0 never waits."""

    def wait(before: int) -> None:
        if before == step != 0 and os.environ.get("RANK", "0") == "0":
            report("waits")
            sys.stdin.readline()

    return wait


def say(step: int, tensors: Iterable[torch.Tensor]) -> None:
    """Report the result of rank 0."""
    data = b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)
    if os.environ.get("RANK", "0") == "0":
        report("result", step, xxhash.xxh3_128_hexdigest(data))


def by_loop(directory: str, gate: Gate) -> None:
    """Train 12 steps by a loop."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    loader = DataLoader(TensorDataset(torch.rand(4 * BATCHES, 2)), 4, shuffle=True)
    policy = Policy(EverySteps(1), [KeepLast(2)], last="link")
    with Loop(directory, policy, options={"lease_s": LEASE_S}, model=model, optimizer=optimizer) as loop:
        loop.resume()
        report("begins", loop.progress.step)
        for _ in loop.epochs(3):
            for (batch,) in loop.batches(loader):
                gate(loop.progress.step + 1)
                optimizer.zero_grad()
                model(batch).square().mean().backward()
                optimizer.step()
                loop.step()
        say(loop.progress.step, model.parameters())


class StopsAt:
    """Stops the training before the first operation on a path that ends with ``end``, once it is armed."""

    def __init__(self, end: str) -> None:
        self.is_armed = False
        self._end = end
        sys.addaudithook(self._look)

    def _look(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.is_armed and event in ("open", "os.mkdir", "os.rename"):
            paths = [str(one) for one in arguments[:2] if isinstance(one, (str, Path))]
            if any(fnmatch(path, f"*/{self._end}") for path in paths):
                self.is_armed = False
                stop_training()


def stop_training() -> None:
    """Stop each rank, and their parent; this process comes last."""
    parent, others = os.getppid(), list[int]()
    if "RANK" in os.environ:
        ranks = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        others = [parent, *(int(pid) for pid in ranks if int(pid) != os.getpid())]
    for pid in (*others, os.getpid()):
        os.kill(pid, signal.SIGSTOP)


def by_trainer(directory: str, gate: Gate, *, attached: bool = True, stop_at: str = "") -> None:
    """Train 12 steps by the HF Trainer; in the save of step 8 stop before rank 0 uses a path like ``stop_at``."""
    stops = StopsAt(stop_at) if stop_at and os.environ.get("RANK", "0") == "0" else None

    class Gates(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            report("begins", state.global_step)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            gate(state.global_step + 1)
            if stops is not None and state.global_step == 7:
                stops.is_armed = True

    policy = Policy(EverySteps(2), [KeepLast(2)], last="link")
    changes: dict[str, Any] = {"max_steps": 12, "eval_strategy": "no", "logging_strategy": "no"}
    changes |= {"ddp_backend": "gloo", "per_device_train_batch_size": 2} if "RANK" in os.environ else {}
    options = {"lease_s": LEASE_S}
    trainer = make_trainer(directory, policy, attached=attached, options=options, callbacks=[Gates()], **changes)
    trainer.train(resume_from_checkpoint=any(Path(directory).glob("checkpoint-*")))
    say(trainer.state.global_step, weights_of(trainer).values())


def by_lightning(directory: str, gate: Gate) -> None:
    """Train 12 steps by Lightning; more ranks have fewer batches each."""

    class Gates(pl.Callback):  # type: ignore[misc]
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            report("begins", trainer.global_step)

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            gate(trainer.global_step + 1)

    policy = Policy(EveryEpochs(1), [KeepLast(2)], last="link")
    callback = CheckpointCallback(directory, policy, lease_s=LEASE_S)
    resume = "last" if any(Path(directory).glob("*.ckpt")) else None
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    changes = {"strategy": "ddp", "devices": ranks} if ranks > 1 else {}
    trained = fit([callback, Gates()], model=Model(), resume=resume, max_epochs=3 * ranks, **changes)
    say(trained.global_step, trained.lightning_module.parameters())


WAYS: Final[dict[str, Callable[..., None]]] = {
    "loop": by_loop,
    "transformers": by_trainer,
    "transformers, not attached": functools.partial(by_trainer, attached=False),
    "lightning": by_lightning,
}


def train(
    directory: str, *, way: str, ranks: int = 1, gate: int = 0, takeover: bool = False, stop_at: str = ""
) -> None:
    """Train by one of `WAYS`; before step ``gate`` rank 0 waits for a line on stdin. `by_trainer` has ``stop_at``."""
    work = functools.partial(WAYS[way], **({"stop_at": stop_at} if stop_at else {}))
    os.environ |= {"CHECKPOINTER_TAKEOVER": "1"} if takeover else {}
    if ranks == 1:
        work(directory, gate_of(gate))
        return
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0]), "NODE_RANK": "0"}
    pids = []
    for rank in range(ranks):
        if not (pid := os.fork()):
            sizes = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
            os.environ |= {**shared, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            os._exit(status_of(lambda: work(directory, gate_of(gate))))
        pids.append(pid)
    codes = _codes(pids)
    report("codes", *codes)
    if any(codes):
        sys.exit(1)


def _codes(pids: list[int]) -> list[int]:
    """Wait for the ranks. If one fails, the others have to end by themselves within `PATIENCE_S`."""
    codes: dict[int, int] = {}
    deadline = float("inf")
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (ended := os.waitpid(pid, os.WNOHANG)) != (0, 0):
                codes[pid] = os.waitstatus_to_exitcode(ended[1])
                deadline = min(deadline, time.monotonic() + PATIENCE_S if codes[pid] else deadline)
        if time.monotonic() > deadline:
            for pid in set(pids) - set(codes):
                os.kill(pid, 9)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


if __name__ == "__main__":
    serve(train)
