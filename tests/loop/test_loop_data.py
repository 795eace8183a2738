"""Which batch comes next, and what is read to find it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpointer_torch import Loop
from small import Points
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, RandomSampler

from checkpointer import CheckpointerWarning, EverySteps, KeepLast, Policy

EVERY = Policy(EverySteps(1), [KeepLast(1)])
COUNT = 10


class Stream(IterableDataset[int]):
    """Data without an index."""

    def __init__(self) -> None:
        self.read = 0

    def __iter__(self) -> Iterator[int]:
        for number in range(COUNT):
            self.read += 1
            yield number


class OwnIterator(DataLoader[Any]):
    """Its iterator is the loader itself, and begins anew for each epoch, as that of Ray Train."""

    def __iter__(self) -> Any:
        self.batches = super().__iter__()
        return self

    def __next__(self) -> Any:
        return next(self.batches)


def seeded(kind: str) -> Any:
    """Return a loader of this kind."""
    data = Points(COUNT)
    generator = torch.Generator().manual_seed(5)
    if kind == "plain":
        return DataLoader(data, 2, shuffle=True, generator=generator)
    if kind == "own iterator":
        return OwnIterator(data, 2, shuffle=True, generator=generator)
    if kind == "batches":
        sampler = RandomSampler(data, generator=generator)
        return DataLoader(data, batch_sampler=BatchSampler(sampler, 2, drop_last=False))
    if kind == "single":
        return DataLoader(data, batch_size=None, sampler=RandomSampler(data, generator=generator))
    if kind == "distributed":
        return DataLoader(data, 2, sampler=DistributedSampler(data, num_replicas=1, rank=0, seed=3))
    if kind == "stream":
        return DataLoader(Stream(), 2)
    if kind == "list":
        return [[0, 1], [2, 3], [4, 5]]
    torchdata = pytest.importorskip("torchdata.stateful_dataloader", reason="needs torchdata")
    workers = 2 if kind == "stateful with workers" else 0
    return torchdata.StatefulDataLoader(data, 2, shuffle=True, generator=generator, num_workers=workers)


def flat(batch: Any) -> Any:
    """Return something that can be compared."""
    return [flat(item) for item in batch] if isinstance(batch, (list, tuple)) else torch.as_tensor(batch).tolist()


def passes(directory: Path | None, loader: Any, *, stop_at: int | None = None) -> list[Any]:
    """Return what two epochs give; ``stop_at`` leaves off after so many steps."""
    given = []
    with Loop(directory, EVERY, loader=loader) if isinstance(loader, DataLoader) else Loop(directory, EVERY) as loop:
        loop.resume()
        for epoch in loop.epochs(2):
            for batch in loop.batches(loader):
                given.append((epoch, flat(batch)))
                loop.step()
                if loop.progress.step == stop_at:
                    return given
    return given


KINDS = [
    "plain",
    "own iterator",
    "batches",
    "single",
    "distributed",
    "stream",
    "list",
    "stateful",
    "stateful with workers",
]


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # What torchdata says of torch.
@pytest.mark.parametrize("kind", KINDS)
def test_left_off_anywhere_the_very_next_batch_comes(tmp_path: Path, kind: str) -> None:
    """Within an epoch, at its end, in the next: no batch twice, none left out, in the order of an unbroken run."""
    unbroken = passes(None, seeded(kind))
    stops = [len(unbroken) // 4, len(unbroken) // 2, len(unbroken) // 2 + 1, len(unbroken) - 1]
    given: list[Any] = []
    for stop in stops:
        given += passes(tmp_path, seeded(kind), stop_at=stop)
    assert unbroken == given + passes(tmp_path, seeded(kind))


def test_a_resume_within_an_epoch_whose_batches_the_loop_did_not_see_says_that_it_begins_again(tmp_path: Path) -> None:
    """The loader was iterated over without batches(). At the end of an epoch nothing is lost."""

    def go_on(steps: int) -> None:
        with Loop(tmp_path, Policy(EverySteps(100), [KeepLast(1)])) as loop:
            loop.resume()
            for _ in loop.epochs(3):
                for _ in range(2):
                    if loop.progress.step == steps:
                        return
                    loop.step()

    go_on(2)
    go_on(3)
    with pytest.warns(
        CheckpointerWarning, match=r"step=3.ckpt was saved within epoch 1, and the batches .* begins again"
    ):
        go_on(9)


def test_what_has_an_index_is_not_read_again(tmp_path: Path) -> None:
    """A skipped batch costs its indices only; a stream has to be read up to the place."""
    first, second = seeded("plain"), seeded("plain")
    passes(tmp_path / "plain", first, stop_at=3)
    passes(tmp_path / "plain", second, stop_at=5)
    assert (6, 4) == (len(first.dataset.read), len(second.dataset.read))
    assert set(range(COUNT)) == {*first.dataset.read, *second.dataset.read}
    stream = seeded("stream")
    passes(tmp_path / "stream", seeded("stream"), stop_at=3)
    passes(tmp_path / "stream", stream, stop_at=5)
    assert COUNT == stream.dataset.read


class Reordered(IterableDataset[int]):
    """A stream that orders its data by a generator of its own, as webdataset does."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(COUNT, generator=torch.Generator().manual_seed(self.seed)).tolist()


def test_data_that_is_in_another_order_when_it_is_read_again_is_warned_of(tmp_path: Path) -> None:
    """The last batch that was used is compared, by a few of its values."""
    passes(tmp_path / "same", DataLoader(Reordered(1), 2), stop_at=3)
    passes(tmp_path / "same", DataLoader(Reordered(1), 2))
    passes(tmp_path / "other", DataLoader(Reordered(1), 2), stop_at=3)
    with pytest.warns(CheckpointerWarning, match="3 batches were read again .* is not the one of before: DataLoader"):
        passes(tmp_path / "other", DataLoader(Reordered(2), 2))


def test_a_batch_that_the_program_changes_is_compared_as_it_was_given(tmp_path: Path) -> None:
    """A step that normalises its batch in place does not make the same data look like other data."""
    for stop_at in (3, 5):
        with Loop(tmp_path, EVERY) as loop:
            loop.resume()
            for batch in loop.batches(DataLoader(Reordered(1), 2)):
                batch.zero_()
                loop.step()
                if loop.progress.step == stop_at:
                    break
    assert 5 == loop.progress.step


def test_the_loader_is_left_as_it_was(tmp_path: Path) -> None:
    """Skipping borrows its sampler for a moment."""
    loader = seeded("plain")
    sampler = loader.batch_sampler
    passes(tmp_path, seeded("plain"), stop_at=3)
    passes(tmp_path, loader)
    assert sampler is loader.batch_sampler
    assert 5 == len(loader)


def test_a_shuffle_of_another_loader_goes_on(tmp_path: Path) -> None:
    """A validation with a generator of its own, given by name."""
    orders = []
    for whole in (True, False):
        directory = tmp_path / str(whole)
        order = []
        for _ in range(1 if whole else 2):
            validation = seeded("plain")
            with Loop(directory, EVERY, validation=validation) as loop:
                loop.resume()
                for _ in loop.epochs(2):
                    for _ in loop.batches(range(2)):
                        loop.step()
                    order.append([flat(batch[1]) for batch in validation])
                    loop.report({})
                    if not whole:
                        continue
        orders.append(order[:2])
    assert orders[0][0] != orders[0][1]
    assert orders[0] == orders[1]


@pytest.mark.parametrize("limit", [3, 4])
def test_an_epoch_may_have_a_limit(tmp_path: Path, limit: int) -> None:
    """It holds across a resume too."""
    for stop in (2, None):
        given = []
        with Loop(tmp_path, EVERY) as loop:
            loop.resume()
            for epoch in loop.epochs(2):
                for number in loop.batches(range(10), limit=limit):
                    given.append((epoch, number))
                    loop.step()
                    if loop.progress.step == stop:
                        break
                if stop:
                    break
    assert [(0, number) for number in range(2, limit)] + [(1, number) for number in range(limit)] == given


@pytest.mark.parametrize("steps", [5, 6], ids=["a break", "all of it"])
def test_the_end_of_the_training_is_saved_if_a_rule_keeps_it(tmp_path: Path, steps: int) -> None:
    """As the other hosts do; once, and not again by a run that has nothing left to do."""
    policy = Policy(EverySteps(4), [KeepLast(1)])

    def train() -> Loop:
        with Loop(tmp_path, policy) as loop:
            loop.resume()
            for _ in loop.epochs(2):
                for _ in loop.batches(range(3)):
                    loop.step()
                    if loop.progress.step == steps:
                        return loop
        return loop

    ended = train() if steps == 5 else (train(), train())[1]
    (record,) = ended.manager.records
    assert (steps, "the training ends; kept: the newest") == (record.step, record.reason)


def test_a_loop_without_epochs_or_batches_saves_its_end_too(tmp_path: Path) -> None:
    """Steps are all that a loop must report."""
    with Loop(tmp_path, Policy(EverySteps(4), [KeepLast(1)])) as loop:
        for _ in range(3):
            loop.step()
    (record,) = loop.manager.records
    assert (3, 0, False) == (record.step, record.epoch, record.epoch_end)


def test_an_end_that_cannot_be_saved_still_closes_the_manager(tmp_path: Path) -> None:
    """So that the next one in this process gets the aliases."""

    class Broken:
        is_bad = False

        def state_dict(self) -> dict[str, int]:
            if self.is_bad:
                raise ValueError("no state today")
            return {}

        def load_state_dict(self, state: dict[str, int]) -> None:
            pass

    broken = Broken()
    policy = Policy(EverySteps(4), [KeepLast(1)], last="link")

    def train(*, breaks: bool) -> Loop:
        with Loop(tmp_path, policy, broken=broken) as loop:
            loop.step()
            broken.is_bad = breaks
        return loop

    with pytest.raises(ValueError, match="no state today"):
        train(breaks=True)
    broken.is_bad = False
    assert train(breaks=False).last is not None


def test_a_resumed_epoch_whose_batches_do_not_come_from_the_loop_warns_at_its_first_step(tmp_path: Path) -> None:
    """They are trained again; the warning names the call that is needed."""
    policy = Policy(EverySteps(1), [KeepLast(1)])
    with Loop(tmp_path, policy) as loop:
        for _ in loop.epochs(1):
            for _ in loop.batches(range(3)):
                loop.step()
                if loop.progress.batch == 2:
                    break
            break
    with Loop(tmp_path, policy) as loop:
        assert 2 == loop.resume().batch
        for _ in loop.epochs(2):
            with pytest.warns(
                CheckpointerWarning, match=r"after batch 2 of epoch 0, .* Iterate over loop.batches"
            ) as said:
                loop.step()
            assert __file__ == said[0].filename
            loop.step()
            break


class Augmented:
    """Draws from two generators of its own, as a transform of albumentations does."""

    def __init__(self) -> None:
        self.rng, self.python_rng = np.random.default_rng(7), random.Random(7)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> float:
        return index + self.rng.random() + self.python_rng.random()


@pytest.mark.parametrize("stop", [3, 4])
def test_an_augmentation_is_exact_if_the_loop_has_its_generators(tmp_path: Path, stop: int) -> None:
    """Within an epoch and at its end, although no batch is read again to get there."""

    def train(folder: str, stop: int = 8) -> list[float]:
        data, seen = Augmented(), []
        loader: Any = DataLoader(data, 1)  # type: ignore[arg-type]
        with Loop(tmp_path / folder, EVERY, rng=data.rng, python_rng=data.python_rng) as loop:
            loop.resume()
            for _ in loop.epochs(2):
                for batch in loop.batches(loader):
                    seen.append(batch.item())
                    loop.step()
                    if loop.progress.step == stop:
                        return seen
        return seen

    whole = train("whole")
    assert whole == train("broken", stop) + train("broken")
