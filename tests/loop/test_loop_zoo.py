"""Every kind of loader, left off at every batch: the items that come are those of a run that nothing interrupts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpointer_torch import Loop
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from checkpointer import EveryEpochs, EverySteps, KeepAll, Policy

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # What torchdata says of torch.

ITEMS, SIZE, EPOCHS = 11, 2, 2
BATCHES = 6
SAVING = (Policy(EverySteps(1), [KeepAll()]), Policy(EveryEpochs(1), [KeepAll()]))
NOT_SAVING = Policy(EverySteps(1000), [KeepAll()])

Make = Callable[[], Any]


class Numbers(Dataset[Any]):
    """Data with an index, which draws a random number for each item, as an augmentation does."""

    def __len__(self) -> int:
        return ITEMS

    def __getitem__(self, index: int) -> Any:
        return index, float(torch.rand(1)), random.random()


class Quiet(Dataset[int]):
    """Data with an index, which draws nothing."""

    def __len__(self) -> int:
        return ITEMS

    def __getitem__(self, index: int) -> int:
        return index


class Counting(Numbers):
    """Data with an index and a state."""

    def __init__(self) -> None:
        self.count = 0

    def __getitem__(self, index: int) -> Any:
        self.count += 1
        return index, self.count

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


class Stream(IterableDataset[int]):
    """Data without an index."""

    def __iter__(self) -> Iterator[int]:
        info = torch.utils.data.get_worker_info()
        yield from range(ITEMS) if info is None else range(info.id, ITEMS, info.num_workers)


class Shuffled(Stream):
    """Data without an index, whose order is that of the epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        yield from random.Random(self.epoch).sample(range(ITEMS), ITEMS)


class StatefulStream(Stream):
    """Data without an index, which knows where it is."""

    def __init__(self) -> None:
        self.place = 0

    def __iter__(self) -> Iterator[int]:
        while self.place < ITEMS:
            self.place += 1
            yield self.place - 1
        self.place = 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


class OwnSampler(Sampler[int]):
    """A sampler with a generator of numpy's, whose passes follow one another."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(7)

    def __iter__(self) -> Iterator[int]:
        yield from self.rng.permutation(ITEMS).tolist()


def moving(kind: type[Any]) -> type[Any]:
    """Return a class of loader whose ``__iter__`` is a generator, as one that moves batches to a device."""

    def iterate(self: Any) -> Iterator[Any]:
        for batch in super(moved, self).__iter__():
            yield batch, float(torch.rand(1))

    moved: type[Any] = type("Moving", (kind,), {"__iter__": iterate})
    return moved


class Ahead(DataLoader[Any]):
    """A loader that reads one batch ahead."""

    def __iter__(self) -> Any:
        batches = super().__iter__()
        current = next(batches, None)
        for following in batches:
            yield current
            current = following
        if current is not None:
            yield current


class Streaming(DataLoader[Any]):
    """As mosaicml's: it counts the samples it has given, and its ``__iter__`` is a generator."""

    given = 0
    start = 0

    def __iter__(self) -> Any:
        self.given, self.start = self.start, 0
        self.dataset.place = self.given  # type: ignore[attr-defined]
        for batch in super().__iter__():
            self.given += len(batch)
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["given"]


class Source:
    """A stream that says where it is, and never ends."""

    def __init__(self) -> None:
        self.place = 0

    def __iter__(self) -> Source:
        return self

    def __next__(self) -> int:
        self.place += 1
        return self.place

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def stateful() -> Any:
    return pytest.importorskip("torchdata.stateful_dataloader", reason="needs torchdata").StatefulDataLoader


def called() -> float:
    return float(torch.rand(1))


def nodes(data: Any, *, batch: int = 0) -> Any:
    tools = pytest.importorskip("torchdata.nodes", reason="needs torchdata")
    node = tools.IterableWrapper(data)
    return tools.Loader(tools.Batcher(node, batch, drop_last=False) if batch else node)


def nodes_sampled() -> Any:
    tools = pytest.importorskip("torchdata.nodes", reason="needs torchdata")
    return tools.Loader(tools.SamplerWrapper(RandomSampler(range(ITEMS), generator=generator())))


def hugging_face_map() -> Any:
    data = pytest.importorskip("datasets", reason="needs datasets")
    return data.Dataset.from_dict({"x": list(range(ITEMS))}).with_format("torch")


def hugging_face(*, shards: int = 1) -> Any:
    return hugging_face_map().to_iterable_dataset(num_shards=shards)


def fabric(loader: Any) -> Any:
    host = pytest.importorskip("lightning.fabric", reason="needs lightning")
    return host.Fabric(accelerator="cpu", devices=1).setup_dataloaders(loader)


def accelerated(loader: Any, **kwargs: Any) -> Any:
    host = pytest.importorskip("accelerate", reason="needs accelerate")
    options = host.utils.DataLoaderConfiguration(**kwargs)
    return host.Accelerator(cpu=True, dataloader_config=options).prepare(loader)


SAMPLERS: dict[str, Make] = {
    "sequential": lambda: SequentialSampler(range(ITEMS)),
    "random": lambda: RandomSampler(range(ITEMS)),
    "random, seeded": lambda: RandomSampler(range(ITEMS), generator=generator()),
    "random, replaced": lambda: RandomSampler(range(ITEMS), replacement=True, num_samples=33, generator=generator()),
    "subset": lambda: SubsetRandomSampler(range(ITEMS)),
    "subset, seeded": lambda: SubsetRandomSampler(range(ITEMS), generator=generator()),
    "weighted": lambda: WeightedRandomSampler([1.0] * ITEMS, ITEMS, replacement=False),
    "weighted, seeded": lambda: WeightedRandomSampler([1.0] * ITEMS, ITEMS, generator=generator()),
    "distributed": lambda: DistributedSampler(Numbers(), num_replicas=2, rank=1, seed=3),
    "of the user": OwnSampler,
}
LOADERS: dict[str, Callable[..., Any]] = {
    "plain": DataLoader,
    "stateful": lambda *args, **kwargs: stateful()(*args, **kwargs),
    "generator": moving(DataLoader),
    "stateful generator": lambda *args, **kwargs: moving(stateful())(*args, **kwargs),
}


def batched(sampler: Any) -> Any:
    return BatchSampler(sampler, SIZE, drop_last=False)


def fed(kind: str, name: str) -> Make:
    return lambda: LOADERS[kind](Numbers(), SIZE, sampler=SAMPLERS[name]())


def fed_in_batches(kind: str, name: str) -> Make:
    return lambda: LOADERS[kind](Numbers(), batch_sampler=batched(SAMPLERS[name]()))


def of(kind: str, data: Callable[[], Any], **kwargs: Any) -> Make:
    return lambda: LOADERS[kind](data(), SIZE, **kwargs)


def shuffled(kind: str) -> Make:
    return lambda: LOADERS[kind](Numbers(), SIZE, shuffle=True, generator=generator())


GENERATORS = ("generator", "stateful generator")
EXACT: dict[str, Make] = {
    **{f"{kind}, {name}": fed(kind, name) for kind in ("plain", "stateful") for name in SAMPLERS},
    **{f"{kind}, {name}": fed(kind, name) for kind in GENERATORS for name in ("random", "weighted, seeded")},
    **{f"{kind}, {name} in batches": fed_in_batches(kind, name) for kind in LOADERS for name in ("random", "weighted")},
    **{f"{kind}, shuffle": of(kind, Numbers, shuffle=True) for kind in LOADERS},
    **{f"{kind}, shuffle, seeded": shuffled(kind) for kind in LOADERS},
    **{f"{kind}, stream": of(kind, Stream) for kind in LOADERS if kind != "generator"},
    **{f"{kind}, stream by epoch": of(kind, Shuffled) for kind in LOADERS if kind != "generator"},
    "stateful, stateful stream": lambda: stateful()(StatefulStream(), SIZE),
    "stateful generator, stateful stream": lambda: moving(stateful())(StatefulStream(), SIZE),
    "stateful, stateful data": lambda: stateful()(Counting(), SIZE, shuffle=True),
    "stateful, stateful data in batches": lambda: stateful()(
        Counting(), batch_sampler=batched(RandomSampler(range(ITEMS)))
    ),
    "streaming": lambda: Streaming(StatefulStream(), SIZE),
    "ahead": lambda: Ahead(Quiet(), SIZE, shuffle=True),
    "one by one": lambda: DataLoader(Numbers(), batch_size=None, sampler=RandomSampler(range(ITEMS))),
    "list": lambda: list(range(BATCHES)),
    "nodes": lambda: nodes(range(ITEMS)),
    "nodes, batched": lambda: nodes(range(ITEMS), batch=SIZE),
    "nodes, sampler": lambda: nodes_sampled(),
    "hf": lambda: DataLoader(hugging_face(), SIZE),
    "hf, shuffled": lambda: DataLoader(hugging_face().shuffle(seed=3, buffer_size=4), SIZE),
    "hf, stateful": lambda: stateful()(hugging_face(), SIZE),
    "hf, stateful, in shards": lambda: stateful()(hugging_face(shards=3), SIZE),
    "hf, map": lambda: DataLoader(hugging_face_map(), SIZE, shuffle=True),
    "fabric": lambda: fabric(DataLoader(Numbers(), SIZE, shuffle=True)),
    "fabric, distributed": lambda: fabric(DataLoader(Numbers(), SIZE, sampler=SAMPLERS["distributed"]())),
    "fabric, stateful": lambda: fabric(stateful()(Numbers(), SIZE, shuffle=True)),
    "fabric, stateful stream": lambda: fabric(stateful()(StatefulStream(), SIZE)),
    "accelerate": lambda: accelerated(DataLoader(Quiet(), SIZE, shuffle=True)),
    "accelerate, seeded": lambda: accelerated(DataLoader(Quiet(), SIZE, shuffle=True, generator=generator())),
    "accelerate, distributed": lambda: accelerated(DataLoader(Quiet(), SIZE, sampler=SAMPLERS["distributed"]())),
    "accelerate, seedable": lambda: accelerated(
        DataLoader(Quiet(), SIZE, shuffle=True), use_seedable_sampler=True, data_seed=4
    ),
    "accelerate, stream": lambda: accelerated(DataLoader(Stream(), SIZE)),
    "accelerate, stateful": lambda: accelerated(DataLoader(Quiet(), SIZE, shuffle=True), use_stateful_dataloader=True),
    "accelerate, stateful stream": lambda: accelerated(
        DataLoader(StatefulStream(), SIZE), use_stateful_dataloader=True
    ),
}
ENDLESS: dict[str, Make] = {
    "a stream with a state": Source,
    "a function": lambda: called,
    "iterator for all epochs": lambda: iter(range(99)),
}


def flat(batch: Any) -> Any:
    """Return something that can be compared."""
    if isinstance(batch, dict):
        return {key: flat(value) for key, value in batch.items()}
    return [flat(item) for item in batch] if isinstance(batch, (list, tuple)) else torch.as_tensor(batch).tolist()


def seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def train(
    directory: Path | None,
    make: Make,
    policy: Policy,
    *,
    source: Path | None = None,
    limit: int | None = None,
    **kwargs: Any,
) -> list[Any]:
    """Return what is given: the step, the epoch, the batch and a random number of the training."""
    seed(2 if source else 1)  # Another process begins with other random numbers.
    given = []
    loader = make()
    with Loop(directory, policy) as loop:
        loop.resume(source, **kwargs)
        for epoch in loop.epochs(EPOCHS):
            for batch in loop.batches(loader, limit=limit):
                given.append((loop.progress.step, epoch, flat(batch), float(torch.rand(1))))
                loop.step()
    return given


def assert_exact(directory: Path, make: Make, *, limit: int | None = None, first: int = 1) -> None:
    """Resume from every step, and from the end of every epoch."""
    for policy in SAVING:
        folder = directory / str(policy.when)
        unbroken = train(folder, make, policy, limit=limit)
        saved = sorted(folder.glob("*.ckpt"))
        assert len(saved) >= EPOCHS
        for path in saved:
            step = torch.load(path, weights_only=True)["loop"]["step"]
            if step >= first:
                assert unbroken[step:] == train(None, make, NOT_SAVING, source=path, limit=limit), path


@pytest.mark.parametrize("kind", EXACT)
def test_left_off_at_any_batch_every_item_comes_once_and_in_order(in_memory: Path, kind: str) -> None:
    """Items, the random numbers of the data, and those of the training."""
    assert_exact(in_memory, EXACT[kind])


@pytest.mark.parametrize("kind", ENDLESS)
def test_an_endless_stream_goes_on_in_the_next_epoch(in_memory: Path, kind: str) -> None:
    """A stream that says where it is, an iterator that is wound forward, a function."""
    assert_exact(in_memory, ENDLESS[kind], limit=4, first=5 if kind.startswith("iterator") else 1)


CUT = [
    "plain, random", "stateful, random", "plain, stream", "stateful, stream", "stateful generator, stream",
    "stateful, stateful stream", "stateful, stateful data", "nodes", "nodes, sampler", "hf, stateful", "accelerate",
    "accelerate, stateful", "fabric, stateful", "list",
]  # fmt: skip


@pytest.mark.parametrize("kind", CUT)
def test_an_epoch_that_ends_before_its_loader_is_followed_as_it_was(in_memory: Path, kind: str) -> None:
    """Whether the next epoch begins anew or goes on is the loader's affair, in both runs."""
    assert_exact(in_memory, EXACT[kind], limit=4)
