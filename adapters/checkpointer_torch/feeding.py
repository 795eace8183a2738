"""Which batch comes next: a pass through the data that can be taken up again, without reading what was used already."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import torch
from torch.utils.data import DataLoader, IterableDataset

from checkpointer_torch.random_state import put_random_state, take_random_state

__all__ = ["Feed", "is_stateful", "put_loader", "take_loader"]

_log: Final = logging.getLogger("checkpointer.torch")


class Feed:
    """The training data's loader and the pass through it.

    A pass is made again from the random states it began with, skipping so many batches by their indices; a loader
    that has a ``state_dict`` is asked to go on by itself.
    """

    def __init__(self) -> None:
        self._loader: Any = None
        self._began: Mapping[str, Any] | None = None
        self._within = False
        self._left_off: Mapping[str, Any] = {}

    def begin(self, loader: Any, *, epoch: int, used: int) -> Iterator[Any]:
        """Return the batches of the epoch: all, or those left after ``used`` if a pass was left off."""
        state, self._left_off = self._left_off, {}
        self._loader = loader
        _set_epoch(loader, epoch)
        if state.get("within"):
            self._within, self._began = True, state["began"]
            return _gone_on(loader, state, used)
        if "loader" in state:
            put_loader(loader, state["loader"])
        self._within = True
        is_warm = _is_warm(loader) or state.get("warm", False)
        self._began = None
        if not is_stateful(loader):
            self._began = {"random": take_random_state(), "loader": take_loader(loader), "warm": is_warm}
        with _as_warm(loader, is_warm):
            batches: Iterator[Any] = iter(loader)
        return batches

    def end(self) -> None:
        """The epoch is over: what comes next is a pass of its own."""
        self._within, self._began = False, None
        self._left_off = {**self._left_off, "within": False}

    def take(self) -> dict[str, Any]:
        """Return what `put` needs to go on from the boundary that the loop is at."""
        if self._loader is None:
            return dict(self._left_off)
        return {
            "loader": take_loader(self._loader),
            "generators": _own_generators(self._loader),
            "began": self._began,
            "within": self._within,
            "warm": _is_warm(self._loader),
        }

    def put(self, state: Mapping[str, Any]) -> None:
        """Let the next pass go on from there."""
        self._loader = self._began = None
        self._within, self._left_off = False, state


def _gone_on(loader: Any, state: Mapping[str, Any], used: int) -> Iterator[Any]:
    """Return the batches left; what is drawn to find the place was drawn before, and changes no random state."""
    now = take_random_state()
    batches: Iterator[Any]
    if is_stateful(loader):
        put_loader(loader, state["loader"])
        batches = iter(loader)
        # torchdata sees to this pass alone: the next one would be shuffled from another state.
        _put_generators(loader, state["generators"])
    else:
        began = state["began"] or {}
        if began:
            put_random_state(began["random"])
            put_loader(loader, began["loader"])
        with _as_warm(loader, began.get("warm", False)):
            batches = _skipped(loader, used)
    put_random_state(now)
    return batches


def is_stateful(loader: Any) -> bool:
    """Return whether a loader keeps its position by itself, as ``torchdata.StatefulDataLoader`` does."""
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def take_loader(loader: Any) -> Any:
    """Return the state of a loader: its own, or that of its random generators."""
    return loader.state_dict() if is_stateful(loader) else _own_generators(loader)


def put_loader(loader: Any, state: Any) -> None:
    """Put a loader into the state that `take_loader` returned."""
    if is_stateful(loader):
        loader.load_state_dict(state)
    else:
        _put_generators(loader, state)


def _put_generators(loader: Any, states: Any) -> None:
    for generator, state in zip(_generators(loader), states, strict=False):
        generator.set_state(state)


def _own_generators(loader: Any) -> list[torch.Tensor]:
    return [generator.get_state() for generator in _generators(loader)]


def _samplers(loader: Any) -> list[Any]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    return [getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]


def _generators(loader: Any) -> list[torch.Generator]:
    found = {}
    for holder in (loader, *_samplers(loader)):
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator):
            found[id(generator)] = generator
    return list(found.values())


def _set_epoch(loader: Any, epoch: int) -> None:
    told: list[Any] = []
    for holder in (loader, *_samplers(loader)):
        if hasattr(holder, "set_epoch") and not any(holder is other for other in told):
            holder.set_epoch(epoch)
            told.append(holder)


def _is_warm(loader: Any) -> bool:
    """Return whether a loader's workers outlive a pass, and are there: then a pass draws no new seed for them."""
    return getattr(loader, "persistent_workers", False) and getattr(loader, "_iterator", None) is not None


@contextlib.contextmanager
def _as_warm(loader: Any, is_warm: bool) -> Iterator[None]:
    """Let a new loader draw its workers' seed elsewhere, if the one before had drawn it in an earlier pass."""
    if not is_warm or _is_warm(loader):
        yield
        return
    own, loader.generator = loader.generator, torch.Generator()
    try:
        yield
    finally:
        loader.generator = own


def _skipped(loader: Iterable[Any], skip: int) -> Iterator[Any]:
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        return _skipped_by_index(loader, skip)
    if skip:
        _log.info("%d batches are read again, to find the place: the data has no index", skip)
    batches: Iterator[Any] = iter(loader)
    for _ in range(skip):
        next(batches, None)
    return batches


def _skipped_by_index(loader: DataLoader[Any], skip: int) -> Iterator[Any]:
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    sampler = getattr(loader, name)
    skipping = _Skipping(sampler, skip)
    # DataLoader lets nobody change its sampler; and a new loader would not be the user's class.
    object.__setattr__(loader, name, skipping)
    try:
        batches = iter(loader)
    finally:
        object.__setattr__(loader, name, sampler)
    skipping.skip()
    return batches


class _Skipping:
    """A sampler that leaves out its first items, once.

    They are drawn when the first one is asked for, or at `skip`: not earlier, since a loader draws the seed of its
    workers first.
    """

    def __init__(self, sampler: Any, count: int) -> None:
        self._sampler = sampler
        self._count = count
        self._items: Iterator[Any] = iter(())

    def __iter__(self) -> Iterator[Any]:
        self._items = iter(self._sampler)
        return self if self._count else self._items

    def __next__(self) -> Any:
        self.skip()
        return next(self._items)

    def skip(self) -> None:
        """Draw what is to be left out."""
        count, self._count = self._count, 0
        for _ in range(count):
            next(self._items, None)

    def __len__(self) -> int:
        return len(self._sampler)
