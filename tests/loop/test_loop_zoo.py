"""Every kind of loader, left off at every batch: the items that come are those of a run that nothing interrupts."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpointer_torch import Loop
from checkpointer_torch.loader_view import LoaderView
from checkpointer_torch.random_state import take_random_state
from checkpointer_torch.skip_batches import DataPass, ResumedFrom
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

from checkpointer import CheckpointerWarning, EveryEpochs, EverySteps, KeepAll, Policy
from checkpointer.errors import MismatchError, ObservationError

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


class Passing(DataLoader[Any]):
    """As litdata's: it has a length, and after the last batch its state is the beginning of the next pass."""

    given = passes = 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Any:
        if self.given == BATCHES:
            self.given, self.passes = 0, self.passes + 1
        for _ in itertools.islice(super().__iter__(), self.given, None):
            self.given += 1
            yield torch.tensor([self.passes, self.given])

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given, "passes": self.passes}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given, self.passes = state["given"], state["passes"]


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


class Wrapper:
    """Something around a loader, as programs write it."""

    def __init__(self, loader: Any) -> None:
        self.within = loader

    def __iter__(self) -> Iterator[Any]:
        yield from self.within


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def stateful() -> Any:
    return pytest.importorskip("torchdata.stateful_dataloader", reason="needs torchdata").StatefulDataLoader


def called() -> float:
    return float(torch.rand(1))


def in_progress_bar(loader: Any) -> Any:
    return pytest.importorskip("tqdm", reason="needs tqdm").tqdm(loader, disable=True)


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


def stateful_sampler() -> Any:
    tools = pytest.importorskip("torchdata.stateful_dataloader.sampler", reason="needs torchdata")
    return tools.StatefulDistributedSampler(Numbers(), num_replicas=1, rank=0, seed=3)


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
    "stateful, stateful sampler": lambda: stateful()(Numbers(), SIZE, sampler=stateful_sampler()),
    "streaming": lambda: Streaming(StatefulStream(), SIZE),
    "passing": lambda: Passing(Stream(), SIZE),
    "ahead": lambda: Ahead(Numbers(), SIZE, shuffle=True),
    "one by one": lambda: DataLoader(Numbers(), batch_size=None, sampler=RandomSampler(range(ITEMS))),
    "wrapped": lambda: Wrapper(DataLoader(Quiet(), SIZE, shuffle=True, generator=generator())),
    "wrapped, distributed": lambda: Wrapper(DataLoader(Quiet(), SIZE, sampler=SAMPLERS["distributed"]())),
    "tqdm": lambda: in_progress_bar(DataLoader(Numbers(), SIZE, shuffle=True)),
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
    "fabric, ahead": lambda: fabric(Ahead(Numbers(), SIZE, shuffle=True)),
    "accelerate": lambda: accelerated(DataLoader(Quiet(), SIZE, shuffle=True)),
    "accelerate, drawing": lambda: accelerated(DataLoader(Numbers(), SIZE, shuffle=True)),
    "accelerate, seeded": lambda: accelerated(DataLoader(Quiet(), SIZE, shuffle=True, generator=generator())),
    "accelerate, distributed": lambda: accelerated(DataLoader(Quiet(), SIZE, sampler=SAMPLERS["distributed"]())),
    "accelerate, seedable": lambda: accelerated(
        DataLoader(Quiet(), SIZE, shuffle=True), use_seedable_sampler=True, data_seed=4
    ),
    "accelerate, stream": lambda: accelerated(DataLoader(Stream(), SIZE)),
    "accelerate, stateful": lambda: accelerated(DataLoader(Quiet(), SIZE, shuffle=True), use_stateful_dataloader=True),
    "accelerate, stateful, drawing": lambda: accelerated(
        DataLoader(Numbers(), SIZE, shuffle=True), use_stateful_dataloader=True
    ),
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


WORKERS: dict[str, Make] = {
    "stateful": lambda: stateful()(Quiet(), SIZE, sampler=SAMPLERS["weighted"](), num_workers=2),
    "stateful, persistent": lambda: stateful()(Quiet(), SIZE, shuffle=True, num_workers=2, persistent_workers=True),
    "stateful stream": lambda: stateful()(StatefulStream(), SIZE, num_workers=2),
    "stream": lambda: DataLoader(Stream(), SIZE, num_workers=2),
    "generator": lambda: moving(DataLoader)(Quiet(), SIZE, shuffle=True, num_workers=2),
    "fabric, persistent": lambda: fabric(
        DataLoader(Quiet(), SIZE, sampler=SAMPLERS["distributed"](), num_workers=2, persistent_workers=True)
    ),
    "accelerate, stateful": lambda: accelerated(
        DataLoader(Quiet(), SIZE, shuffle=True, num_workers=2), use_stateful_dataloader=True
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", WORKERS)
def test_with_workers_every_item_comes_once_and_in_order(in_memory: Path, kind: str) -> None:
    """At some steps of both epochs, and at the end of each."""
    for policy in SAVING:
        folder = in_memory / str(policy.when)
        unbroken = train(folder, WORKERS[kind], policy)
        half = len(unbroken) // 2
        for step in (2, half, half + 1) if policy is SAVING[0] else (half,):
            (path,) = folder.glob(f"*step={step}.ckpt")
            assert unbroken[step:] == train(None, WORKERS[kind], NOT_SAVING, source=path), path


@pytest.mark.slow
def test_where_the_data_has_an_index_the_number_of_workers_may_change(in_memory: Path) -> None:
    """The batches are skipped by index, so the state of the workers is not needed."""
    one, two = (lambda n=n: stateful()(Quiet(), SIZE, shuffle=True, num_workers=n) for n in (1, 2))
    unbroken = train(in_memory, one, SAVING[0])
    (within,) = in_memory.glob("epoch=0-step=2*.ckpt")
    assert unbroken[2:] == train(None, two, NOT_SAVING, source=within)
    none = of("stateful", Quiet, shuffle=True)
    with pytest.raises(MismatchError, match="workers True then, False now"):
        train(None, none, NOT_SAVING, source=within)
    with pytest.warns(CheckpointerWarning, match="goes on at the nearest sample, after 2 batches"):
        given = train(None, none, NOT_SAVING, source=within, strict=False)
    assert unbroken[2:BATCHES] == given[: BATCHES - 2]


@pytest.mark.parametrize("kind", ["fabric", "accelerate", "accelerate, stateful", "nodes"])
def test_a_loader_of_another_package_can_be_given_by_name(in_memory: Path, kind: str) -> None:
    """As a validation's, whose shuffle goes on."""

    def given(directory: Path | None, policy: Policy, source: Path | None = None) -> list[Any]:
        found = []
        seed(2 if source else 1)
        validation = EXACT[kind]()
        with Loop(directory, policy, validation=validation) as loop:
            loop.resume(source)
            for _ in loop.epochs(EPOCHS):
                for _ in loop.batches(range(2)):
                    loop.step()
                found.append([flat(batch) for batch in validation])
        return found

    unbroken = given(in_memory, SAVING[1])
    (end,) = in_memory.glob("epoch=0*.ckpt")
    assert unbroken[1:] == given(None, NOT_SAVING, end)


# What differs


def fail(directory: Path, make: Make) -> None:
    """Save a rescue at step 3."""
    with Loop(directory, Policy(EverySteps(2), [KeepAll()])) as loop:
        seed(1)
        for _ in loop.batches(make()):
            torch.rand(1)
            loop.step()
            if loop.progress.step == 3:
                raise KeyError("step 3")


def test_a_refused_resume_leaves_the_run_as_it_was(in_memory: Path) -> None:
    """What the exception saves has the place that was not found, for the next start with the right data."""
    unbroken = train(None, EXACT["plain, shuffle"], NOT_SAVING)
    with pytest.raises(KeyError, match="step 3"):
        fail(in_memory, EXACT["plain, shuffle"])
    for _ in range(2):
        with pytest.raises(MismatchError, match="3 batches of this epoch were read from other data"):
            train(in_memory, EXACT["list"], NOT_SAVING, source=in_memory / "rescue-step=3.ckpt")
    assert unbroken[3:] == train(in_memory, EXACT["plain, shuffle"], NOT_SAVING)


class Shrunk(Numbers):
    def __len__(self) -> int:
        return ITEMS - 3


DIFFERENT: dict[str, tuple[str, Make, str]] = {
    "more data": ("plain, shuffle", lambda: DataLoader(Shrunk(), SIZE, shuffle=True), "dataset length 11 then, 8 now"),
    "another batch size": (
        "plain, shuffle",
        lambda: DataLoader(Numbers(), 3, shuffle=True),
        "batch size 2 then, 3 now",
    ),
    "the last batch dropped": (
        "plain, shuffle",
        lambda: DataLoader(Numbers(), SIZE, shuffle=True, drop_last=True),
        "batches 6 then, 5 now, drop_last False then, True now",
    ),
    "not shuffled": (
        "plain, shuffle",
        lambda: DataLoader(Numbers(), SIZE),
        "sampler 'BatchSampler of RandomSampler' then, 'BatchSampler of SequentialSampler' now",
    ),
    "another seed": (
        "plain, distributed",
        lambda: DataLoader(Numbers(), SIZE, sampler=DistributedSampler(Numbers(), num_replicas=2, rank=1, seed=4)),
        "sampler seed 3 then, 4 now",
    ),
    "stateful to plain": ("stateful, shuffle", EXACT["plain, shuffle"], "'StatefulDataLoader' then, 'DataLoader' now"),
    "plain to stateful": ("plain, shuffle", EXACT["stateful, shuffle"], "'DataLoader' then, 'StatefulDataLoader' now"),
    "other workers of a stream": (
        "stateful, stateful stream",
        lambda: stateful()(StatefulStream(), SIZE, num_workers=1),
        "num_workers 0 then, 1 now",
    ),
    "loader to list": ("plain, shuffle", EXACT["list"], "loader 'DataLoader' then, 'iterable' now"),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_other_data_within_an_epoch_is_refused_by_name(in_memory: Path, kind: str) -> None:
    """Nothing is trained on it; between epochs it is a warning."""
    name, make, text = DIFFERENT[kind]
    train(in_memory, EXACT[name], Policy(EverySteps(1), [KeepAll()]))
    (within,) = in_memory.glob("epoch=0-step=2*.ckpt")
    with pytest.raises(MismatchError, match=f"2 batches of this epoch were read from other .*{text}.*strict=False"):
        train(None, make, NOT_SAVING, source=within)


def test_between_epochs_other_data_is_a_warning(in_memory: Path) -> None:
    """The new epoch begins with it, from its beginning."""
    train(in_memory, EXACT["stateful, stateful stream"], SAVING[1])
    (end,) = in_memory.glob("epoch=0*.ckpt")
    with pytest.warns(CheckpointerWarning, match="num_workers 0 then, 1 now; the new epoch uses the new data"):
        given = train(None, lambda: stateful()(StatefulStream(), SIZE, num_workers=1), NOT_SAVING, source=end)
    assert BATCHES == len(given)


@pytest.mark.parametrize("kind", ["plain, shuffle", "plain, sequential", "stateful, random"])
def test_another_batch_size_can_go_on_at_the_nearest_sample(in_memory: Path, kind: str) -> None:
    """After 3 batches of 2 at the second batch of 5: of 11 items only the one before the place comes again."""
    train(in_memory, EXACT[kind], SAVING[0])
    (within,) = in_memory.glob("epoch=0-step=3*.ckpt")
    unbroken = [item for _, epoch, batch, _ in train(None, EXACT[kind], NOT_SAVING) for item in batch[0] if epoch == 0]
    make: Make = lambda: type(EXACT[kind]())(Numbers(), 5, sampler=EXACT[kind]().sampler)  # noqa: E731
    with pytest.warns(CheckpointerWarning, match="goes on at the nearest sample, after 1 batch$"):
        given = train(None, make, NOT_SAVING, source=within, strict=False)
    assert unbroken[5:] == [item for _, epoch, batch, _ in given for item in batch[0] if epoch == 0]


def test_other_data_can_begin_the_epoch_anew(in_memory: Path) -> None:
    """As strict=False asks for."""
    train(in_memory, EXACT["plain, shuffle"], SAVING[0])
    (within,) = in_memory.glob("epoch=0-step=3*.ckpt")
    with pytest.warns(CheckpointerWarning, match="the training begins the epoch anew"):
        given = train(None, lambda: DataLoader(Shrunk(), SIZE), NOT_SAVING, source=within, strict=False)
    assert [[0, 1], [2, 3], [4, 5], [6, 7]] * 2 == [batch[0] for _, _, batch, _ in given]


# What cannot be restored


class OncePrepared(DataLoader[Any]):
    """A loader that begins its only pass when it is made, as those that keep their workers over epochs do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.passes = super().__iter__()

    def __iter__(self) -> Any:
        return (next(self.passes) for _ in range(3))


class Repeating(DataLoader[Any]):
    """A loader without an end."""

    def __iter__(self) -> Any:
        while True:
            yield from super().__iter__()


class Drawing(Sampler[int]):
    """A sampler that draws each index when it is asked for, from what all draw from."""

    def __iter__(self) -> Iterator[int]:
        return iter(lambda: random.randrange(ITEMS), None)


REFUSED: dict[str, tuple[Make, int, str]] = {
    "a pass begun early": (
        lambda: OncePrepared(Numbers(), SIZE),
        2,
        r"iter\(OncePrepared\) does not begin a pass of DataLoader, .*; give it state_dict",
    ),
    "a loader that repeats": (
        lambda: Repeating(Numbers(), SIZE),
        8,
        "Repeating went through its data more than once in the epoch, 2 batches ago",
    ),
    "a sampler that draws": (
        lambda: DataLoader(Numbers(), SIZE, sampler=Drawing()),
        4,
        "the sampler of DataLoader draws from the global random numbers all through the epoch",
    ),
    "an iterator after one epoch": (lambda: iter(range(99)), 9, "the epoch before used 9 batches of one"),
    "a part of a pass": (
        lambda: Streaming(StatefulStream(), SIZE),
        4,
        "the epoch before ended before the end of Streaming, which cannot be begun anew",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_restored_is_refused_by_name(in_memory: Path, kind: str) -> None:
    """With what it would do instead."""
    make, steps, text = REFUSED[kind]
    policy = SAVING[1] if kind.startswith(("an iterator", "a part")) else SAVING[0]
    train(in_memory, make, policy, limit=9 if policy is SAVING[0] else steps)
    (path,) = in_memory.glob(f"epoch=0-step={steps}.ckpt")
    with pytest.raises(MismatchError, match=text + r".*resume\(strict=False\)"):
        train(None, make, NOT_SAVING, source=path, limit=9)


def test_batches_out_of_order_are_refused() -> None:
    """Workers that may overtake one another leave no place."""
    loader = DataLoader(Numbers(), SIZE, num_workers=1, in_order=False)
    state = {"began": {"random": take_random_state(), "loader": []}, "generators": []}
    with pytest.raises(MismatchError, match="last: DataLoader has in_order=False, so which batches were used is not"):
        DataPass(LoaderView(loader), 0, ResumedFrom(source="last")).go_on_by_index(state, used=2)


@pytest.mark.parametrize("kind", ["generator", "plain"])
def test_data_that_draws_while_it_is_read_again_is_warned_of(in_memory: Path, kind: str) -> None:
    """The draws may decide on the order: it cannot be known."""

    class Noisy(Stream):
        def __iter__(self) -> Iterator[Any]:
            for number in super().__iter__():
                yield number, random.random()

    make: Make = of("generator", Stream) if kind == "generator" else lambda: DataLoader(Noisy(), SIZE)
    unbroken = train(in_memory, make, SAVING[0])
    (within,) = in_memory.glob("epoch=0-step=3*.ckpt")
    with pytest.warns(CheckpointerWarning, match="3 batches were read again to find the place, and reading them drew"):
        assert unbroken[3:] == train(None, make, NOT_SAVING, source=within)


@pytest.mark.parametrize("kind", ["a stream with a state", "a function"])
def test_a_stream_that_says_where_it_is_is_not_read_again(in_memory: Path, kind: str) -> None:
    """Eleven batches of twelve were used; one is read."""
    reads = []

    class Counted(Source):
        def __next__(self) -> int:
            reads.append(1)
            return super().__next__()

    def count() -> int:
        reads.append(1)
        return 0

    make: Make = Counted if kind != "a function" else lambda: count
    train(in_memory, make, SAVING[0], limit=BATCHES)
    assert 12 == len(reads)
    (path,) = in_memory.glob("*step=11.ckpt")
    train(None, make, NOT_SAVING, source=path, limit=BATCHES)
    assert 13 == len(reads)


@pytest.mark.parametrize("make", [lambda: iter(range(3)), list], ids=["used up", "empty"])
def test_an_epoch_without_batches_is_an_error(make: Make) -> None:
    """It is never what was meant."""
    with pytest.raises(ObservationError, match=r"epoch . has no batches: .* gave none"):
        train(None, make, NOT_SAVING)


def test_a_generator_for_each_epoch_is_read_from_its_beginning(in_memory: Path) -> None:
    """Iterators that are not the same one are not wound forward over the epochs before."""

    def given(directory: Path | None, policy: Policy, source: Path | None = None) -> list[Any]:
        found = []
        with Loop(directory, policy) as loop:
            loop.resume(source)
            for epoch in loop.epochs(3):
                for number in loop.batches(number + 10 * epoch for number in range(4)):
                    found.append(number)
                    loop.step()
        return found

    for policy in SAVING:
        folder = in_memory / str(policy.when)
        unbroken = given(folder, policy)
        for path in folder.glob("*.ckpt"):
            step = torch.load(path, weights_only=True)["loop"]["step"]
            assert unbroken[step:] == given(None, NOT_SAVING, path)


def test_what_the_body_draws_before_its_batches_is_not_drawn_twice(in_memory: Path) -> None:
    """A resumed epoch runs the beginning of its body again."""

    def given(directory: Path | None, policy: Policy, source: Path | None = None) -> list[Any]:
        found = []
        seed(1)
        with Loop(directory, policy) as loop:
            loop.resume(source)
            for _ in loop.epochs(2):
                torch.rand(5)
                for _ in loop.batches(range(3)):
                    found.append(float(torch.rand(1)))
                    loop.step()
        return found

    unbroken = given(in_memory, SAVING[0])
    for step in (1, 2, 4, 5):
        (path,) = in_memory.glob(f"*step={step}.ckpt")
        assert unbroken[step:] == given(None, NOT_SAVING, path)


def test_a_stateful_loader_given_by_name_changes_nothing(in_memory: Path) -> None:
    """Its state_dict would begin a pass before the first one, and draw; what it restores is not skipped again."""

    def given(directory: Path | None, policy: Policy, source: Path | None = None) -> list[Any]:
        found = []
        seed(2 if source else 1)
        loader, validation = (stateful()(Numbers(), SIZE, shuffle=True) for _ in range(2))
        with Loop(directory, policy, loader=loader, validation=validation) as loop:
            loop.resume(source)
            for _ in loop.epochs(EPOCHS):
                for batch in loop.batches(loader):
                    found.append(flat(batch))
                    loop.step()
                loop.report({"val": sum(float(batch[1].sum()) for batch in validation)})
        return found

    unbroken = given(in_memory, SAVING[0])
    assert unbroken == given(None, NOT_SAVING)
    for path in in_memory.glob("*.ckpt"):
        assert unbroken[torch.load(path, weights_only=True)["loop"]["step"] :] == given(None, NOT_SAVING, path)


def test_a_sampler_with_a_state_is_not_given_beside_its_loader() -> None:
    """It would be wound forward by its own state, and by the place in the loader."""

    class Kept(OwnSampler):
        def state_dict(self) -> dict[str, int]:
            return {}

        def load_state_dict(self, state: dict[str, int]) -> None:
            pass

    sampler = Kept()
    with (
        pytest.raises(ObservationError, match="kept is the sampler of the loader that batches"),
        Loop(None, NOT_SAVING, kept=sampler) as loop,
    ):
        next(loop.batches(DataLoader(Numbers(), SIZE, sampler=sampler)))


# Gradients


def accumulate(directory: Path, *, each: int, zero_at_end: bool = False) -> None:
    """Train two epochs of eight batches, with an update after ``each``."""
    model = torch.nn.Linear(1, 1)
    with Loop(directory, SAVING[1], model=model) as loop:
        loop.resume()
        for _ in loop.epochs(loop.progress.epoch + 2):
            for number in loop.batches(range(8)):
                model(torch.ones(1)).sum().backward()
                if number % each == each - 1:
                    loop.step()
            if zero_at_end:
                model.zero_grad()


def test_gradients_left_over_at_the_end_of_an_epoch_are_said_once(tmp_path: Path) -> None:
    """And again by the resume that goes on without them."""
    with pytest.warns(CheckpointerWarning, match=r"epoch 0 ended 2 batches after its last step\(\)") as caught:
        accumulate(tmp_path, each=3)
    assert 1 == len(caught)
    with pytest.warns(CheckpointerWarning, match="the gradients of its last 2 batches are not in it") as caught:
        accumulate(tmp_path, each=4)
    assert 1 == len(caught)


@pytest.mark.parametrize("kind", [{"each": 1}, {"each": 4}, {"each": 3, "zero_at_end": True}])
def test_an_epoch_that_leaves_no_gradients_is_quiet(tmp_path: Path, kind: dict[str, Any]) -> None:
    """Its batches are a multiple, or what is left is thrown away."""
    accumulate(tmp_path, **kind)
    accumulate(tmp_path, **kind)
