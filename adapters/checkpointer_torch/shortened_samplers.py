"""Samplers in the place of a loader's own: they leave out what an epoch has used."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import attrs
from torch.utils.data import DistributedSampler

from checkpointer_torch.random_state import same_random_state, take_random_state


@attrs.frozen
class Rest:
    """A sampler of what an epoch has left, after another number of processes has used the first samples."""

    sampler: Any
    """The `DistributedSampler` of the epoch."""
    used: int

    def __iter__(self) -> Iterator[int]:
        sampler, whole = self.sampler, copy.copy(self.sampler)
        whole.num_replicas, whole.rank = 1, 0
        whole.num_samples = whole.total_size = len(whole.dataset)
        order = list(DistributedSampler.__iter__(whole))
        count = self._count(len(order))
        # As the sampler itself: what is missing is taken from the beginning of the order.
        shared = itertools.chain(order[self.used :], itertools.cycle(order))
        return itertools.islice(shared, sampler.rank, count * sampler.num_replicas, sampler.num_replicas)

    def __len__(self) -> int:
        return self._count(len(self.sampler.dataset))

    def _count(self, samples: int) -> int:
        left, replicas = max(samples - self.used, 0), self.sampler.num_replicas
        return int(left // replicas if self.sampler.drop_last else -(-left // replicas))


class Skipping:
    """A sampler that leaves out its first items, once.

    They are drawn when the first item is asked for, or at `skip`. They are not drawn earlier, because a loader draws
    the seed of its workers first. A sampler may draw in ``iter``, so that is called as often as for the original pass.
    """

    def __init__(self, sampler: Any, count: int, num_iters: int) -> None:
        self._sampler = sampler
        self._count = count
        self._num_iters = num_iters
        self._items: Iterator[Any] = iter(())
        self._is_done = False
        self.missing = 0
        """Items that were to be left out, and were not there."""
        self.drew = False
        """Whether items after the first one drew from the global random numbers."""

    def __iter__(self) -> Iterator[Any]:
        if self._is_done:  # Workers that outlive the pass ask for the next one here.
            return iter(self._sampler)
        if self._num_iters:
            self._num_iters -= 1
            self._items = iter(self._sampler)
        return self

    def __next__(self) -> Any:
        self.skip()
        return next(self._items)

    def __len__(self) -> int:
        return len(self._sampler)

    def skip(self) -> None:
        """Draw what is to be left out."""
        if self._is_done:
            return
        while self._num_iters:
            iter(self)
        self._is_done = True
        if self._count:
            drawn = len(list(itertools.islice(self._items, 1)))
            first = take_random_state()
            drawn += sum(1 for _ in itertools.islice(self._items, self._count - drawn))
            self.missing = self._count - drawn
            self.drew = not same_random_state(first, take_random_state())
