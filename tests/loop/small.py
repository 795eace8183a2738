"""A small training with everything random in it: shuffling, dropout, noise from python and numpy, batch statistics."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
import xxhash
from checkpointer_torch import Loop
from support.forking import CONTEXT
from torch import nn
from torch.utils.data import DataLoader, Dataset

from checkpointer import AnyOf, EveryEpochs, EverySteps, KeepBest, KeepLast, Policy

BATCHES = 7
EPOCHS = 3
POLICY = Policy(AnyOf(EverySteps(3), EveryEpochs(1)), [KeepBest(1, "val", mode="min"), KeepLast(1)], last="link")
PATIENCE_S = 120.0

Tick = Callable[[str, int], None]
"""Called with the place in the training, and the step."""


class Points(Dataset[Any]):
    """Data with an index, that counts what is read of it in this process."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        return torch.sin(torch.arange(6) * float(index + 1)), torch.tensor(index % 3)


def make_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3))


class Small:
    """All that a training consists of."""

    def __init__(self, *, workers: int = 0, persistent: bool = False, seeded: bool = True) -> None:
        torch.manual_seed(1)
        random.seed(2)
        np.random.seed(3)
        self.model = make_net()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, gamma=0.9)
        self.data = Points(BATCHES * 4 - 1)
        generator = torch.Generator().manual_seed(4) if seeded else None
        self.loader = DataLoader(
            self.data,
            4,
            shuffle=True,
            generator=generator,
            num_workers=workers,
            persistent_workers=persistent,
            # As ever on Linux; a child of a fork server would start another one.
            multiprocessing_context="fork" if workers else None,
        )

    @property
    def objects(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}

    def learn(self, batch: Any) -> torch.Tensor:
        """Change the weights, with noise from every generator."""
        points, labels = batch
        points = points + 0.1 * random.random() + 0.1 * float(np.random.rand())
        loss = nn.functional.cross_entropy(self.model(points), labels)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()

    def validate(self) -> float:
        """Draw random numbers, as a shuffled validation does."""
        return float(torch.rand(1))

    def train(
        self, directory: Path | None, *, tick: Tick = lambda *_: None, policy: Policy = POLICY, **options: Any
    ) -> str:
        """Train to the end, and return a digest of all that can be seen of it."""
        with Loop(directory, policy, **self.objects, **options) as loop:
            loop.resume()
            for _ in loop.epochs(EPOCHS):
                for batch in loop.batches(self.loader):
                    step = loop.progress.step + 1
                    tick("before", step)
                    loss = self.learn(batch)
                    tick("within", step)
                    loop.step({"loss": loss})
                    tick("after", step)
                val = self.validate()
                self.scheduler.step()
                loop.report({"val": val})
                tick("end", loop.progress.step)
        return self.digest()

    def digest(self) -> str:
        """Return a digest that differs if two trainings differ in a single bit."""
        seen = [*self.model.state_dict().values(), torch.get_rng_state(), torch.tensor(self.scheduler.last_epoch)]
        for state in self.optimizer.state.values():
            seen += list(state.values())
        numbers = repr((random.getstate(), np.random.get_state()[1].tolist()))  # type: ignore[index]
        return xxhash.xxh3_128_hexdigest(b"".join(tensor.numpy().tobytes() for tensor in seen) + numbers.encode())


@attrs.frozen
class At:
    """A tick that does something at one point of the training."""

    where: str
    step: int
    numbers: tuple[int, ...] = (signal.SIGKILL,)

    def __call__(self, where: str, step: int) -> None:
        if (where, step) == (self.where, self.step):
            for number in self.numbers:
                # The workers too, as when the power fails.
                alone = number != signal.SIGKILL
                os.kill(os.getpid(), number) if alone else os.killpg(0, number)


def die_at(where: str, step: int) -> Tick:
    """Return a tick that kills this process and its workers."""
    return At(where, step)


def say_at(where: str, step: int, *numbers: int) -> Tick:
    """Return a tick that sends this process signals there."""

    return At(where, step, numbers)


def run(directory: Path, tick: Tick | None, kind: dict[str, Any]) -> tuple[int, str]:
    """Train in a process of its own; return its exit code and its digest."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_train, args=(directory, tick, kind, sender))
    process.start()
    sender.close()
    process.join(PATIENCE_S)
    digest = receiver.recv() if process.exitcode == 0 else ""
    assert process.exitcode is not None
    return process.exitcode, digest


def _train(directory: Path, tick: Tick | None, kind: dict[str, Any], sender: Any) -> None:
    os.setpgid(0, 0)
    torch.set_num_threads(1)
    small = Small(**kind)
    sender.send(small.train(directory, tick=tick) if tick else small.train(directory))
