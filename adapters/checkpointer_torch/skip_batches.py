"""Finds the place in a pass: by the indices of the batches, by the loader's own state, or by reading again."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import attrs
import torch

from checkpointer.errors import MismatchError, warn
from checkpointer_torch.loader_view import LoaderView
from checkpointer_torch.random_state import put_random_state, same_random_state, take_random_state
from checkpointer_torch.shortened_samplers import Rest, Skipping

_log: Final = logging.getLogger("checkpointer.torch")
_MARKED: Final = 8
"""Values of a batch that are remembered, to compare it with the one that is read again."""
_LEAVES: Final = (int, float, str, bytes, torch.Tensor)
"""Looked for first: to ask whether a batch is a `Mapping` takes as long as the rest of a step."""

Make = Callable[[], Any]
"""Makes the iterator of a ``DataLoader``."""
Began = Mapping[str, Any]
"""The random states at the beginning of a pass, and whether and how its workers were started."""


@attrs.frozen(kw_only=True)
class ResumedFrom:
    """The checkpoint that the training was resumed from, and how strictly."""

    source: str = ""
    """The checkpoint's name; empty for a training that was not resumed."""
    is_strict: bool = True
    """Whether a place that cannot be restored is an error."""
    ranks: tuple[int, int] = (1, 1)
    """How many processes have saved it, and how many have resumed it."""
    used: int = 0
    """Batches of the epoch that each process of the checkpoint had used."""
    is_alike: bool = False
    """Whether all of those processes were at the same place of the same data."""
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
        warn(f"{self.source}: {what}")


def put_start(view: LoaderView, began: Began) -> None:
    """Put the random states where they were when a pass began."""
    put_random_state(began["random"])
    view.put_generators(began["loader"])


@attrs.frozen
class DataPass:
    """A pass through a loader; each method returns its batches from another place on."""

    view: LoaderView
    epoch: int
    origin: ResumedFrom
    before: int = 0
    """Samples of the epoch that another number of processes has used."""

    def begin(self, began: Began) -> Iterator[Any]:
        """Return all batches; the loader's pass before may have been in another process."""
        view, inner = self.view, self.view.inner
        no_state = view.is_indexed or view.stateful is None
        if no_state and view.is_torchdata and (inner._initial_iter_for_state_dict or inner.next_iter_state):
            view.forget()  # A pass that was begun for a state_dict() has drawn its random numbers already.

        def start(make: Make) -> Any:
            if view.is_indexed and began["iters"] != num_iters(view):
                return self._make_skipped(make, began, used=0)
            with _as_warm(view, began["warm"]):
                return make()

        batches, was_called = self._iterate(start)
        if not was_called and self.origin.source and inner is not None and not view.is_warm:
            self._refuse_unknown("goes on with the order that it has now")
        return batches

    def go_on_by_index(self, state: Mapping[str, Any], used: int) -> Iterator[Any]:
        """Return the batches after those used, which are not read again."""
        view, began, now = self.view, state["began"], take_random_state()
        if view.inner.num_workers and not getattr(view.inner, "in_order", True):
            what = f"{view.kind} has in_order=False, so which batches were used is not known"
            self.origin.refuse(what, f"skips the first {used} batches of the order")
        view.forget()

        def start(make: Make) -> Any:
            iterator = self._make_skipped(make, began, used)
            put_random_state(now)
            return iterator

        put_start(view, began)
        batches, was_called = self._iterate(start, used, state.get("ahead", ()))
        if not was_called:
            self._refuse_unknown("reads it again up to the place")
            _read(batches, used)
            put_random_state(now)
        return batches

    def go_on_by_state(self, state: Mapping[str, Any], used: int) -> Iterator[Any]:
        """Return the batches that the loader's own state leaves."""
        now = take_random_state()

        def restore() -> None:
            self.view.put_generators(state["generators"])
            put_random_state(now)

        def start(make: Make) -> Any:
            iterator = make()
            indices = getattr(iterator, "_sampler_iter", None)
            if isinstance(indices, itertools.islice):  # Torchdata skips in the sampler at the first batch: skip now.
                iterator._sampler_iter = _primed(indices)
            restore()
            return iterator

        if state["began"]:
            put_start(self.view, state["began"])
        self.view.stateful.load_state_dict(state["loader"])
        with _without_restart(self.view.loader):
            batches, was_called = self._iterate(start, used, state.get("ahead", ()))
        if not was_called:
            restore()
        return batches

    def go_on_by_reading(self, began: Began, used: int, mark: str = "") -> Iterator[Any]:
        """Return the batches after those used, which are read again. The last of them had this mark."""
        now = take_random_state()
        if used:
            _log.info("%d batches are read again, to find the place: the data has no index", used)
        if self.view.is_torchdata and self.view.stateful is None:
            self.view.forget()
        if began:
            put_start(self.view, began)
        with _as_warm(self.view, began.get("warm", False)):
            batches: Iterator[Any] = iter(self.view.loader)
        last = _read(batches, min(used, 1))
        first = take_random_state()
        last = _read(batches, used - 1) if used > 1 else last
        if not same_random_state(first, take_random_state()):
            self.origin.warn(
                f"{used} batches were read again to find the place, and reading them drew random numbers. If the order "
                "of the batches depends on random numbers, it is not the same as before. Give the data a generator of "
                "its own, or state_dict and load_state_dict"
            )
        elif mark and mark != mark_of(values_of(last)):
            self.origin.warn(
                f"{used} batches were read again to find the place, and the last of them is not the one of before: "
                f"{self.view.kind} gives its data in another order, so some come twice and others never. Give it a "
                "seed of its own that is the same at each start, or state_dict and load_state_dict"
            )
        put_random_state(now)
        return batches

    def put_end(self, state: Mapping[str, Any]) -> None:
        """Put the loader where it was at the end of the pass that was left.

        If the loader's own state is taken over, its next ``iter`` begins the next pass, as in the process before.
        """
        view = self.view
        if not view.is_indexed and view.stateful is not None and "loader" in state and not state.get("differs"):
            now = take_random_state()
            view.stateful.load_state_dict(state["loader"])
            if view.is_torchdata:
                view.inner._get_iterator()
                is_taken = True
            else:
                with _without_restart(view.loader):
                    is_taken = not inspect.isgenerator(iter(view.loader))
            put_random_state(now)
            if not is_taken and view.inner is not None and not is_over(state):
                what = f"the epoch before ended before the end of {view.kind}, which cannot be begun anew"
                self.origin.refuse(what, "goes on in that pass")
        view.put_generators(state.get("generators", ()))

    def _iterate(
        self, start: Callable[[Make], Any], used: int = 0, ahead: Iterable[Any] = ()
    ) -> tuple[Iterator[Any], bool]:
        """Return the batches, and whether ``start`` has made the iterator of the ``DataLoader`` for them.

        A loader may have an ``__iter__`` of its own, before or around the one of ``DataLoader``. So it is replaced
        where ``DataLoader`` makes its iterator, once.
        """
        inner = self.view.inner
        if inner is None:
            return iter(self.view.loader), False
        make, was_called = inner._get_iterator, False

        def get_iterator() -> Any:
            nonlocal was_called
            was_called = True
            inner.__dict__.pop("_get_iterator", None)
            self.view.keep_epoch(self.epoch)
            iterator = start(make)
            self.view.watch(iterator, used, ahead)
            return iterator

        object.__setattr__(inner, "_get_iterator", get_iterator)
        try:
            batches = iter(self.view.loader)
            if not was_called:  # A generator: it begins when its first batch is asked for.
                batches = _primed(batches)
        finally:
            inner.__dict__.pop("_get_iterator", None)
        return batches, was_called

    def _make_skipped(self, make: Make, began: Began, used: int) -> Any:
        """Return an iterator whose sampler has left out the batches used."""
        view = self.view
        name = "sampler" if view.inner.batch_sampler is None else "batch_sampler"
        sampler = getattr(view.inner, name)
        if self.before:
            sampler = copy.copy(sampler)
            sampler.sampler = Rest(view.distributed_sampler, self.before)
        skipping = Skipping(sampler, used, began.get("iters", num_iters(view)))
        # A new loader would not be of the user's class, so the sampler of this one is replaced.
        with _replaced(view.inner, name, skipping), _as_warm(view, began.get("warm", False)):
            iterator = make()
        skipping.skip()
        if skipping.missing:
            what = f"{view.kind} went through its data more than once in the epoch, {skipping.missing} batches ago"
            self.origin.refuse(what, "goes on at the beginning of the data")
        if skipping.drew:
            what = (
                f"the sampler of {view.kind} draws from the global random numbers all through the epoch, so its order "
                "cannot be found again; give it a generator of its own"
            )
            self.origin.refuse(what, "goes on with another order")
        return iterator

    def _refuse_unknown(self, otherwise: str) -> None:
        msg = f"iter({self.view.kind}) does not begin a pass of DataLoader, so its place cannot be found by index"
        self.origin.refuse(f"{msg}; give it state_dict and load_state_dict", otherwise)


def is_over(state: Mapping[str, Any]) -> bool:
    """Return whether a pass has no more batches; torchdata's loader may know it before the last ``next``."""
    own = state.get("loader")
    if state.get("over") or not isinstance(own, Mapping):
        return bool(state.get("over"))
    # accelerate reads one batch ahead. A worker that has ended is asked again by torchdata, and may begin anew.
    workers = own.get("_snapshot", {}).get("_worker_snapshots", {}).values()
    ended = [(worker.get("fetcher_state") or {}).get("fetcher_ended", False) for worker in workers]
    return bool(own.get("_iterator_finished")) or (bool(ended) and all(ended))


def num_iters(view: LoaderView, *, is_warm: bool = False) -> int:
    """Return how often a ``DataLoader`` calls ``iter`` of its sampler for a pass: twice, if it starts workers."""
    return 2 if getattr(view.inner, "num_workers", 0) and not is_warm else 1


def mark_of(values: Any) -> str:
    """Return what `values_of` found in a batch as text; empty for None."""
    return "" if values is None else repr(values)


def values_of(batch: Any) -> Any:
    """Return a few values of a batch. None if they cannot be had at no cost, as from another device.

    The loop calls this for each batch, because the program may change a batch later.

    Example:
        >>> values_of({"x": torch.arange(100.0), "y": 1})
        [0.0, 12.0, 24.0, 36.0, 48.0, 60.0, 72.0, 84.0]
    """
    while not isinstance(batch, _LEAVES) and isinstance(batch, (Mapping, list, tuple)) and batch:
        batch = next(iter(batch.values() if isinstance(batch, Mapping) else batch))
    if isinstance(batch, (int, float)):
        return batch
    if isinstance(batch, (str, bytes)):
        return batch[:100]
    if type(batch) is not torch.Tensor or batch.device.type != "cpu" or batch.layout != torch.strided:
        return None
    values = batch.detach()
    while values.dim() > 1:  # Without a copy.
        values = values.view(-1) if values.is_contiguous() else values[0] if len(values) else values.new_empty(0)
    values = values.view(-1)
    step = max(values.numel() // _MARKED, 1)
    return values[: step * _MARKED : step].tolist()


def _read(batches: Iterator[Any], count: int) -> Any:
    """Read so many batches, and return the last one."""
    last = None
    for _ in range(count):
        last = next(batches, None)
    return last


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


def _as_warm(view: LoaderView, was_warm: bool) -> contextlib.AbstractContextManager[None]:
    """Let a new loader draw its workers' seed elsewhere, if the one before had drawn it in an earlier pass."""
    if view.inner is None or not was_warm or view.is_warm:
        return contextlib.nullcontext()
    return _replaced(view.inner, "generator", torch.Generator())


def _without_restart(loader: Any) -> contextlib.AbstractContextManager[None]:
    """Let a ``torchdata.nodes.Loader`` that is at its end not begin anew within the epoch."""
    if not getattr(loader, "restart_on_stop_iteration", False):
        return contextlib.nullcontext()
    return _replaced(loader, "restart_on_stop_iteration", False)
