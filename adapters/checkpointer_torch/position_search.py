"""Finds the place in a pass: by the indices of the batches, by the loader's own state, or by reading again."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import attrs
import torch

from checkpointer import CheckpointerWarning
from checkpointer.errors import MismatchError
from checkpointer_torch.loader_facts import (
    forget,
    is_indexed,
    is_of_torchdata,
    keep_epoch,
    put_generators,
    stateful_loader,
    torch_loader,
)
from checkpointer_torch.random_state import put_random_state, same_random_state, take_random_state

__all__ = [
    "ResumedFrom",
    "begin_pass",
    "go_on_by_index",
    "go_on_by_reading",
    "go_on_by_state",
    "is_warm",
    "num_iters",
    "put_end",
]

_log: Final = logging.getLogger("checkpointer.torch")

Make = Callable[[], Any]
"""Makes the iterator of a ``DataLoader``."""


@attrs.frozen(kw_only=True)
class ResumedFrom:
    """The checkpoint that the training was resumed from, and how strictly."""

    source: str = ""
    """The checkpoint's name; empty for a training that was not resumed."""
    is_strict: bool = True
    """Whether a place that cannot be restored is an error."""
    is_of_other_ranks: bool = False
    """Whether the checkpoint is from another number of processes."""
    random: Mapping[str, Any] | None = None
    """The random states at the boundary; None for a process that the checkpoint has none of."""

    def refuse(self, what: str, otherwise: str) -> None:
        """Raise `MismatchError`, or warn if the resume was not strict."""
        if self.is_strict:
            msg = (
                f"{self.source}: {what}. Give batches() the loader it was saved with; resume(strict=False) {otherwise}"
            )
            raise MismatchError(msg)
        self.warn(f"{what}; the training {otherwise}")

    def warn(self, what: str) -> None:
        """Warn that something is not exact."""
        warnings.warn(f"{self.source}: {what}", CheckpointerWarning, stacklevel=2)


def begin_pass(loader: Any, began: Mapping[str, Any], epoch: int, *, origin: ResumedFrom) -> Iterator[Any]:
    """Return a pass from its beginning; the loader's pass before may have been in another process."""
    inner: Any = torch_loader(loader)
    if is_indexed(loader) and is_of_torchdata(inner) and (inner._initial_iter_for_state_dict or inner.next_iter_state):
        forget(inner)  # A pass that was begun for a state_dict() has drawn its random numbers already.

    def start(make: Make) -> Any:
        if is_indexed(loader) and began["iters"] != num_iters(loader):
            return _skipped(loader, make, began, used=0)[0]
        with _as_warm(loader, began["warm"]):
            return make()

    batches, was_called = _iterated(loader, start, epoch)
    if not was_called and origin.source and inner is not None and not is_warm(loader):
        _refuse_unknown(loader, origin, "goes on with the order that it has now")
    return batches


def go_on_by_index(
    loader: Any, state: Mapping[str, Any], *, epoch: int, used: int, origin: ResumedFrom
) -> Iterator[Any]:
    """Return the batches after those used, which are not read again."""
    inner: Any = torch_loader(loader)
    began, now = state["began"], take_random_state()
    if inner.num_workers and not getattr(inner, "in_order", True):
        what = f"{type(loader).__name__} has in_order=False, so which batches were used is not known"
        origin.refuse(what, f"skips the first {used} batches of the order")
    forget(inner)

    def start(make: Make) -> Any:
        iterator, skipping = _skipped(loader, make, began, used=used)
        skipping.check(type(loader).__name__, origin)
        put_random_state(now)
        return iterator

    put_generators(loader, began["loader"])
    put_random_state(began["random"])
    batches, was_called = _iterated(loader, start, epoch)
    if not was_called:
        _refuse_unknown(loader, origin, "reads it again up to the place")
        _read(batches, used)
        put_random_state(now)
    return batches


def go_on_by_state(loader: Any, state: Mapping[str, Any], *, epoch: int) -> Iterator[Any]:
    """Return the batches that a loader's own state leaves."""
    began, now = state["began"], take_random_state()

    def restore() -> None:
        put_generators(loader, state["generators"])
        put_random_state(now)

    def start(make: Make) -> Any:
        iterator = make()
        indices = getattr(iterator, "_sampler_iter", None)
        if isinstance(indices, itertools.islice):  # Torchdata skips in the sampler at the first batch: skip now.
            iterator._sampler_iter = _primed(indices)
        restore()
        return iterator

    if began:
        put_generators(loader, began["loader"])
        put_random_state(began["random"])
    stateful_loader(loader).load_state_dict(state["loader"])
    with _without_restart(loader):
        batches, was_called = _iterated(loader, start, epoch)
    if not was_called:
        restore()
    return batches


def go_on_by_reading(loader: Any, began: Mapping[str, Any], used: int, *, origin: ResumedFrom) -> Iterator[Any]:
    """Return the batches after those used, which are read again."""
    now = take_random_state()
    if used:
        _log.info("%d batches are read again, to find the place: the data has no index", used)
    if began:
        put_generators(loader, began["loader"])
        put_random_state(began["random"])
    with _as_warm(loader, began.get("warm", False)):
        batches: Iterator[Any] = iter(loader)
    _read(batches, min(used, 1))
    first = take_random_state()
    _read(batches, used - 1)
    if not same_random_state(first, take_random_state()):
        origin.warn(
            f"{used} batches were read again to find the place, and reading them drew random numbers: if their order "
            "depends on those, it is not the order of before. Give the data a generator of its own, or state_dict "
            "and load_state_dict"
        )
    put_random_state(now)
    return batches


def put_end(loader: Any, state: Any) -> bool:
    """Put a loader with a state where a pass ended, and return whether the loader has taken that over.

    If it has, its next ``iter`` begins the next pass, as it would have in the process that was left.
    """
    inner, now = torch_loader(loader), take_random_state()
    stateful_loader(loader).load_state_dict(state)
    if is_of_torchdata(inner):
        inner._get_iterator()  # type: ignore[union-attr]
        is_taken = True
    else:
        with _without_restart(loader):
            is_taken = not inspect.isgenerator(iter(loader))
    put_random_state(now)
    return is_taken


def is_warm(loader: Any) -> bool:
    """Return whether a loader's workers outlive a pass, and run: then a pass draws no new seed for them."""
    inner: Any = torch_loader(loader)
    return inner is not None and inner.persistent_workers and inner._iterator is not None


def num_iters(loader: Any, *, is_warm: bool = False) -> int:
    """Return how often a ``DataLoader`` calls ``iter`` of its sampler for a pass: twice, if it starts workers."""
    return 2 if getattr(torch_loader(loader), "num_workers", 0) and not is_warm else 1


def _iterated(loader: Any, start: Callable[[Make], Any], epoch: int) -> tuple[Iterator[Any], bool]:
    """Return the batches, and whether ``start`` has made the iterator of the ``DataLoader`` for them.

    A loader may have an ``__iter__`` of its own, before or around the one of ``DataLoader``. So it is replaced where
    ``DataLoader`` makes its iterator, once.
    """
    inner = torch_loader(loader)
    if inner is None:
        return iter(loader), False
    make, was_called = inner._get_iterator, False

    def get_iterator() -> Any:
        nonlocal was_called
        was_called = True
        inner.__dict__.pop("_get_iterator", None)
        keep_epoch(loader, epoch)
        return start(make)

    object.__setattr__(inner, "_get_iterator", get_iterator)
    try:
        batches = iter(loader)
        if not was_called:  # A generator: it begins when its first batch is asked for.
            batches = _primed(batches)
    finally:
        inner.__dict__.pop("_get_iterator", None)
    return batches, was_called


def _refuse_unknown(loader: Any, origin: ResumedFrom, otherwise: str) -> None:
    kind = type(loader).__name__
    msg = f"iter({kind}) does not begin a pass of DataLoader, so its place cannot be found by index"
    origin.refuse(f"{msg}; give it state_dict and load_state_dict", otherwise)


def _read(batches: Iterator[Any], count: int) -> None:
    for _ in range(count):
        next(batches, None)


def _primed(items: Iterator[Any]) -> Iterator[Any]:
    """Return the same items, after the first one was read."""
    return itertools.chain(list(itertools.islice(items, 1)), items)


@contextlib.contextmanager
def _replaced(thing: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute meanwhile, also one that a ``DataLoader`` refuses to replace."""
    before = getattr(thing, name)
    object.__setattr__(thing, name, value)
    try:
        yield
    finally:
        object.__setattr__(thing, name, before)


def _as_warm(loader: Any, was_warm: bool) -> contextlib.AbstractContextManager[None]:
    """Let a new loader draw its workers' seed elsewhere, if the one before had drawn it in an earlier pass."""
    inner = torch_loader(loader)
    if inner is None or not was_warm or is_warm(loader):
        return contextlib.nullcontext()
    return _replaced(inner, "generator", torch.Generator())


def _without_restart(loader: Any) -> contextlib.AbstractContextManager[None]:
    """Let a ``torchdata.nodes.Loader`` that is at its end not begin anew within the epoch."""
    if not getattr(loader, "restart_on_stop_iteration", False):
        return contextlib.nullcontext()
    return _replaced(loader, "restart_on_stop_iteration", False)


def _skipped(loader: Any, make: Make, began: Mapping[str, Any], *, used: int) -> tuple[Any, _Skipping]:
    """Return an iterator whose sampler has left out the batches used."""
    inner: Any = torch_loader(loader)
    name = "sampler" if inner.batch_sampler is None else "batch_sampler"
    skipping = _Skipping(getattr(inner, name), used, began.get("iters", num_iters(loader)))
    # A new loader would not be of the user's class, so the sampler of this one is replaced.
    with _replaced(inner, name, skipping), _as_warm(loader, began.get("warm", False)):
        iterator = make()
    skipping.skip()
    return iterator, skipping


class _Skipping:
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
        self._missing = 0
        """Items that were to be left out, and were not there."""
        self._drew = False
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
            self._missing = self._count - drawn
            self._drew = not same_random_state(first, take_random_state())

    def check(self, name: str, origin: ResumedFrom) -> None:
        """Refuse a loader of this name if its sampler did not lead to the place."""
        if self._missing:
            what = f"{name} went through its data more than once in the epoch, {self._missing} batches ago"
            origin.refuse(what, "goes on at the beginning of the data")
        if self._drew:
            what = (
                f"the sampler of {name} draws from the global random numbers all through the epoch, so its order "
                "cannot be found again; give it a generator of its own"
            )
            origin.refuse(what, "goes on with another order")
