"""A training for torchrun on hosts that come and go. Each process writes what it does into one file for the test.

All ranks get the same batches, so the weights after a step are the same for any number of ranks, and for one process.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import uuid
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
import xxhash
from checkpointer_torch import Loop
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from checkpointer import EverySteps, KeepLast, Policy
from support.host_me import Stops

POLICY: Final = Policy(EverySteps(1), [KeepLast(2)])
GATE: Final = 2
"""Before this step of a process it waits for the test."""
LAST: Final = 2
"""Steps after the gate at which the test ends the training."""
ROAMING_S: Final = 0.05
"""Seconds of a step while the training waits for another host."""
ON, END, ROAM, AGAIN = 0, -1, -2, -3
"""Answers of the test: train on, to the end, slowly, or up to the next step. A number is that of the operation at
which the process has to stop."""


class Net(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 4)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(torch.tanh(self.up(batch)))
        return out


def new_training() -> tuple[Net, torch.optim.Optimizer]:
    """Return a net before its first step, and its optimizer."""
    torch.manual_seed(0)
    net = Net()
    return net, torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)


def learn(net: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Take a step, with the batch of this step."""
    batch = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
    optimizer.zero_grad()
    net(batch).square().mean().backward()
    optimizer.step()


def digest(net: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Return a digest of all weights and momenta; a collective if they are sharded."""
    tensors = [*net.parameters()]
    tensors += [found for one in net.parameters() if (found := optimizer.state[one].get("momentum_buffer")) is not None]
    whole = [one.full_tensor() if isinstance(one, DTensor) else one for one in tensors]
    return xxhash.xxh3_64_hexdigest(b"".join(one.detach().numpy().tobytes() for one in whole))


def undisturbed(steps: int) -> list[str]:
    """Return the digest after each step of a training of one process that nothing disturbed."""
    net, optimizer = new_training()
    found = [digest(net, optimizer)]
    for step in range(steps):
        learn(net, optimizer, step)
        found.append(digest(net, optimizer))
    return found


class Notes:
    """What this process says to the test, and what the test answers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        group = [uuid.uuid4().hex[:8]]
        dist.broadcast_object_list(group)
        self._about = {
            "group": group[0],
            "rank": dist.get_rank(),
            "size": dist.get_world_size(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        self._log = os.open(folder / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def say(self, what: str, **values: Any) -> None:
        """Append a line, in one piece."""
        os.write(self._log, (json.dumps({"what": what, **self._about, **values}) + "\n").encode())

    def ask(self, **values: Any) -> int:
        """Wait for the test's answer."""
        path = self._folder / uuid.uuid4().hex
        self.say("asks", path=str(path), **values)
        while not path.exists():
            time.sleep(0.01)
        return int(path.read_text())


class Struck(Stops):
    """Stops this process at an operation in the directory, and says so before."""

    def __init__(self, directory: str, notes: Notes) -> None:
        super().__init__(directory, 0)
        self._notes = notes

    def arm(self, at: int) -> None:
        """Stop at operation ``at`` from here; 0 only counts."""
        self.count, self._at = 0, at

    def _stop(self, event: str, arguments: tuple[Any, ...]) -> None:
        self._notes.say("stops", at=self.count, event=event, path=str(arguments[0]))
        os.kill(os.getpid(), signal.SIGSTOP)


def train(way: str, directory: str, folder: Path, options: dict[str, Any]) -> None:
    """Train until the test ends it. ``way`` is ``replicated`` (DDP, files) or ``sharded`` (FSDP2, folders)."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    notes = Notes(folder)
    net, _ = new_training()
    model: nn.Module = net if way == "sharded" else DistributedDataParallel(net)
    if way == "sharded":
        fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    struck = Struck(directory, notes)
    with Loop(directory, POLICY, options=options, model=net, optimizer=optimizer) as loop:
        loop.resume()
        notes.say("resumes", step=loop.progress.step, digest=digest(net, optimizer))
        gate, end, pause_s = loop.progress.step + GATE, -1, 0.0
        while loop.progress.step != end:
            step = loop.progress.step
            learn(model, optimizer, step)
            if step + 1 == gate:
                answer = notes.ask(step=gate, operations=struck.count)
                end, pause_s = gate + LAST if answer == END else -1, ROAMING_S if answer == ROAM else 0.0
                gate += answer == AGAIN
                struck.arm(max(answer, 0))
            loop.step()
            notes.say("saved", step=step + 1, digest=digest(net, optimizer))
            time.sleep(pause_s)
    notes.say("ends", step=loop.progress.step)
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "saved by . processes, resumed by")
    torch.set_num_threads(1)
    given_way, given_directory, given_folder, given_options = sys.argv[1:]
    train(given_way, given_directory, Path(given_folder), json.loads(given_options))
