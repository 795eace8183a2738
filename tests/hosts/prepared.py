"""Trainings by Fabric and by accelerate, with a random number everywhere, each saved and resumed by six added lines."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
import xxhash
from checkpointer_torch import Loop
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, WeightedRandomSampler

from checkpointer import EverySteps, KeepAll, KeepLast, Policy

EPOCHS, ITEMS, SIZE, MICRO = 2, 15, 3, 2
BATCHES = ITEMS // SIZE
"""Batches of an epoch in one process, an odd number: the last step of an epoch accumulates one batch only."""
POLICY = Policy(EverySteps(1), [KeepLast(1)])

Tick = Callable[[str, int], None]
"""Called with the place in the training, and the batches that were given so far in all epochs."""


class Points(Dataset[Any]):
    """Data that draws from every generator when it is read, as an augmentation does."""

    def __len__(self) -> int:
        return ITEMS

    def __getitem__(self, index: int) -> Any:
        noise = torch.rand(4) + random.random() + float(np.random.rand())
        return torch.sin(torch.arange(4) * float(index + 1)) + 0.1 * noise, torch.tensor(index % 3)


@attrs.define
class Training:
    """What every such training consists of before a host has prepared it."""

    seed: int = 0
    net: nn.Module = attrs.field(init=False)
    optimizer: Any = attrs.field(init=False)
    scheduler: Any = attrs.field(init=False)
    loader: Any = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.draw_from(1)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.05)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, gamma=0.9)
        self.loader = DataLoader(Points(), SIZE, shuffle=True)

    def draw_from(self, seed: int) -> None:
        """Seed every generator."""
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Return the loss of a batch, with noise of this rank."""
        points, labels = batch
        return 8 * nn.functional.cross_entropy(model(points * (1 + 0.1 * random.random())), labels)

    def digest(self, *more: Any) -> str:
        """Return a digest that differs if two trainings differ in a single bit."""
        seen = [*self.net.state_dict().values(), torch.get_rng_state(), torch.tensor(self.scheduler.last_epoch)]
        for state in self.optimizer.state.values():
            seen += list(state.values())
        drawn = repr((random.getstate(), np.random.get_state(legacy=False), more)).encode()
        return xxhash.xxh3_128_hexdigest(b"".join(tensor.numpy().tobytes() for tensor in seen) + drawn)


def scaler(power: int) -> Any:
    """Return a scaler whose first steps overflow and are skipped, and which grows again later."""
    return torch.amp.GradScaler("cpu", init_scale=2.0**power, growth_interval=2)


def by_accelerate(
    directory: Path | None,
    tick: Tick,
    *,
    policy: Policy = POLICY,
    source: Path | None = None,
    scaled: bool = False,
    **kw: Any,
) -> tuple[int, str, str]:
    """Train, and return the step, why it was stopped, and the digest."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=MICRO, dataloader_config=DataLoaderConfiguration(**kw)
    )
    if scaled:  # accelerate itself makes one for fp16 on a GPU.
        accelerator.scaler = scaler(127)
    mine = Training()
    model, optimizer, loader, scheduler = accelerator.prepare(mine.net, mine.optimizer, mine.loader, mine.scheduler)
    mine.draw_from(100 + accelerator.process_index + 10 * (source is not None))
    objects = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": accelerator.scaler}
    with Loop(directory, policy, **objects) as loop:
        loop.resume(source)
        for epoch in loop.epochs(EPOCHS):
            for number, batch in enumerate(loop.batches(loader), epoch * BATCHES + loop.progress.batch + 1):
                with accelerator.accumulate(model):
                    loss = mine.loss(model, batch)
                    accelerator.backward(loss)
                    tick("within", number)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                loop.step({"loss": loss.detach()})
                tick("after", number)
    scale = accelerator.scaler.state_dict() if scaled else {}
    return loop.progress.step, loop.stopped, mine.digest(scale)


def by_fabric(
    directory: Path | None, tick: Tick, *, policy: Policy = POLICY, source: Path | None = None, scaled: bool = False
) -> tuple[int, str, str]:
    """Train, and return the step, why it was stopped, and the digest."""
    from lightning.fabric import Fabric
    from lightning.fabric.plugins import MixedPrecision

    size = int(os.environ.get("WORLD_SIZE", "1"))
    plugins = [MixedPrecision("16-mixed", "cpu", scaler(15))] if scaled else []
    fabric = Fabric(accelerator="cpu", devices=size, strategy="ddp" if size > 1 else "auto", plugins=plugins)
    fabric.launch()
    mine = Training()
    model, optimizer = fabric.setup(mine.net, mine.optimizer)
    loader = fabric.setup_dataloaders(mine.loader)
    mine.draw_from(100 + fabric.global_rank + 10 * (source is not None))
    objects = {"model": model, "optimizer": optimizer, "scheduler": mine.scheduler}
    with Loop(directory, policy, **objects, precision=fabric.strategy.precision) as loop:
        loop.resume(source)
        for epoch in loop.epochs(EPOCHS):
            for number, batch in enumerate(loop.batches(loader), loop.progress.batch + 1):
                is_accumulating = number % MICRO != 0 and number != len(loader)
                with fabric.no_backward_sync(model, enabled=is_accumulating and size > 1):
                    loss = mine.loss(model, batch)
                    fabric.backward(loss)
                tick("within", epoch * BATCHES + number)
                if not is_accumulating:
                    optimizer.step()
                    mine.scheduler.step()
                    optimizer.zero_grad()
                    loop.step({"loss": loss.detach()})
                tick("after", epoch * BATCHES + number)
    return loop.progress.step, loop.stopped, mine.digest(fabric.strategy.precision.state_dict())


HOSTS: dict[str, tuple[Callable[..., tuple[int, str, str]], dict[str, Any]]] = {
    "accelerate": (by_accelerate, {}),
    "accelerate, seedable sampler": (by_accelerate, {"use_seedable_sampler": True, "data_seed": 4}),
    "accelerate, stateful loader": (by_accelerate, {"use_stateful_dataloader": True}),
    "accelerate, scaled": (by_accelerate, {"scaled": True}),
    "fabric": (by_fabric, {}),
    "fabric, scaled": (by_fabric, {"scaled": True}),
}
EVERY_STEP = Policy(EverySteps(1), [KeepAll()])
RARELY = Policy(EverySteps(1000), [KeepAll()])


# Loaders alone, whose ranks have random numbers of their own.


class Quiet(Points):
    """Data that draws nothing."""

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([float(index)])


class Noisy(Points):
    """Data that draws."""

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([float(index), float(torch.rand(1)), random.random()], dtype=torch.float64)


class Stream(IterableDataset[Any]):
    """Data without an index."""

    def __iter__(self) -> Iterator[Any]:
        return map(Quiet().__getitem__, range(ITEMS))


class StatefulStream(Stream):
    """Data without an index, which knows where it is."""

    place = 0

    def __iter__(self) -> Iterator[Any]:
        while self.place < ITEMS:
            self.place += 1
            yield torch.tensor([float(self.place - 1)])
        self.place = 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


def accelerated(loader: Any, **kwargs: Any) -> Any:
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    return Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**kwargs)).prepare(loader)


def of_fabric(loader: Any) -> Any:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), strategy="ddp")
    fabric.launch()
    return fabric.setup_dataloaders(loader)


def stateful(*args: Any, **kwargs: Any) -> Any:
    return pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader(*args, **kwargs)


def shuffled(data: Any = Noisy, **kwargs: Any) -> Any:
    return DataLoader(data(), SIZE, shuffle=True, **kwargs)


def weighted() -> Any:
    generator = torch.Generator().manual_seed(5)
    return DataLoader(Noisy(), SIZE, sampler=WeightedRandomSampler([1.0] * ITEMS, ITEMS, generator=generator))


LOADERS: dict[str, Callable[[], Any]] = {
    "accelerate": lambda: accelerated(shuffled()),
    "accelerate, split": lambda: accelerated(DataLoader(Noisy(), 4, shuffle=True), split_batches=True),
    "accelerate, seedable": lambda: accelerated(shuffled(), use_seedable_sampler=True, data_seed=4),
    "accelerate, weighted": lambda: accelerated(weighted()),
    "accelerate, stateful": lambda: accelerated(shuffled(), use_stateful_dataloader=True),
    "accelerate, dispatched": lambda: accelerated(shuffled(Quiet), dispatch_batches=True),
    "accelerate, dispatched, seedable": lambda: accelerated(
        shuffled(Quiet), dispatch_batches=True, use_seedable_sampler=True, data_seed=4
    ),
    "accelerate, dispatched, dropped": lambda: accelerated(shuffled(Quiet, drop_last=True), dispatch_batches=True),
    "accelerate, dispatched, stateful": lambda: accelerated(
        shuffled(Quiet), dispatch_batches=True, use_stateful_dataloader=True
    ),
    "accelerate, stream": lambda: accelerated(DataLoader(Stream(), SIZE)),
    "accelerate, stream on each rank": lambda: accelerated(DataLoader(Stream(), SIZE), dispatch_batches=False),
    "accelerate, stateful stream on each rank": lambda: accelerated(
        DataLoader(StatefulStream(), SIZE), use_stateful_dataloader=True, dispatch_batches=False
    ),
    "fabric": lambda: of_fabric(shuffled()),
    "fabric, weighted": lambda: of_fabric(weighted()),
    "fabric, stateful": lambda: of_fabric(stateful(Noisy(), SIZE, shuffle=True)),
    "fabric, stream": lambda: of_fabric(DataLoader(Stream(), SIZE)),
}


def walk(directory: Path | None, kind: str, source: Path | None = None) -> list[Any]:
    """Return what is given: the step, the batch and a random number of the training."""
    given = []
    loader = LOADERS[kind]()
    mine = Training()
    mine.draw_from(100 + int(os.environ["RANK"]) + 10 * (source is not None))
    with Loop(directory, EVERY_STEP if directory else RARELY) as loop:
        loop.resume(source)
        for _ in loop.epochs(EPOCHS):
            for batch in loop.batches(loader):
                given.append((loop.progress.step, batch.tolist(), float(torch.rand(1))))
                loop.step()
    return given
