"""Which batch comes next: a pass through the data that can be taken up again."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from checkpointer.errors import MismatchError
from checkpointer_torch.loader_facts import (
    described,
    differing,
    is_indexed,
    is_stateful,
    keeper,
    put_generators,
    set_epoch,
    take_generators,
    take_loader,
    torch_loader,
)
from checkpointer_torch.position_search import (
    At,
    Resumed,
    again,
    by_index,
    by_itself,
    ended,
    is_warm,
    num_iters,
    started,
)
from checkpointer_torch.random_state import put_random_state, take_random_state

__all__ = ["Feed"]

_OF_A_RANK = {"batches", "dataset length"}
"""What another number of processes changes."""


class Feed:
    """The training data's loader and the pass through it.

    A pass is made again from the random states it began with. The batches that were used are skipped by their
    indices; a loader with a ``state_dict`` goes on by itself; any other iterable is read again.
    """

    def __init__(self) -> None:
        self._loader: Any = None
        self._facts: Mapping[str, Any] = {}
        self._began: Mapping[str, Any] | None = None
        self._within = self._is_over = False
        self._iterator = _Shared()
        self._left_off: dict[str, Any] = {}
        self._origin = Resumed()

    # A pass

    def settle(self, loader: Any, used: int) -> int:
        """Compare the loader with the one that was left off, and return how many of its batches were used.

        Raises:
            MismatchError: If the place is not in this loader, and the resume was strict.
        """
        state, origin = self._left_off, self._origin
        other = differing(state.get("data", {}), described(loader))
        if origin.is_of_other_ranks:
            other = {name: values for name, values in other.items() if name not in _OF_A_RANK}
        if not other:
            return used
        text = ", ".join(f"{name} {there!r} then, {here!r} now" for name, (there, here) in other.items())
        if not state.get("within"):
            origin.warn(f"the data is not the data of the epoch before: {text}; the new epoch begins with it")
            self._left_off = {**state, "differs": True}
            return used
        batches = "1 batch of this epoch was" if used == 1 else f"{used} batches of this epoch were"
        what = f"{batches} read from other data: {text}"
        there, here = other.get("batch size", (1, 1))
        if set(other) <= {"batch size", "batches", "workers"} and there and here and is_indexed(loader):
            nearest: int = used * there // here
            origin.refuse(what, f"goes on at the nearest sample, after {nearest} batches")
            return nearest
        origin.refuse(what, "begins the epoch anew")
        self._left_off = {}
        return 0

    def begin(self, loader: Any, *, epoch: int, used: int) -> Iterator[Any]:
        """Return the batches of the epoch: all, or those left after ``used`` if a pass was left off."""
        state, before = self._left_off, self._loader
        now = take_random_state()
        if state.get("within") and self._origin.random is not None:
            # The epoch's body may have drawn before it asked for its batches; the run that was left had done so too.
            put_random_state(self._origin.random)
        try:
            return self._begun(loader, state, epoch=epoch, used=used)
        except MismatchError:
            self._left_off, self._loader = state, before
            put_random_state(now)
            raise

    def _begun(self, loader: Any, state: Mapping[str, Any], *, epoch: int, used: int) -> Iterator[Any]:
        used_before = self._iterator.begin(loader, self._loader, state, origin=self._origin)
        self._left_off = {}
        self._loader, self._facts = loader, described(loader)
        set_epoch(loader, epoch)
        is_within = bool(state.get("within"))
        self._within, self._is_over = True, is_within and _is_over(state)
        if self._is_over:
            self._began = state["began"]
            self._put_end(loader, state)
            return iter(())
        if is_within and (used or not is_indexed(loader)):
            self._began = state["began"]
            return self._gone_on(loader, state, At(epoch, used_before + used))
        return self._anew(loader, state, At(epoch, used_before))

    def _gone_on(self, loader: Any, state: Mapping[str, Any], at: At) -> Iterator[Any]:
        # A loader that keeps its place, of a checkpoint that has none of that place, is skipped like another.
        if is_indexed(loader) and state["began"]:
            return by_index(loader, state, at, origin=self._origin)
        if keeper(loader) is not None:
            return by_itself(loader, state, at.epoch)
        return again(loader, state["began"] or {}, at.used, origin=self._origin)

    def _anew(self, loader: Any, state: Mapping[str, Any], at: At) -> Iterator[Any]:
        if state.get("within"):  # Its first batch was not used: the pass is made again.
            put_random_state(state["began"]["random"])
            put_generators(loader, state["began"]["loader"])
        elif state:
            self._put_end(loader, state)
        warm = is_warm(loader) or state.get("warm", False)
        began = self._began or state.get("began")
        if not (self._iterator.is_shared and began):
            began = {"random": take_random_state(), "loader": take_generators(loader), "warm": warm}
            began["iters"] = num_iters(loader, is_warm=warm)
        self._began = began
        if at.used:
            return again(loader, began, at.used, origin=self._origin)
        batches = started(loader, began, at.epoch, origin=self._origin)
        if not state or keeper(loader) is None:
            return batches
        first = list(itertools.islice(batches, 1))
        if first:
            return itertools.chain(first, batches)
        # Its state was the end of the epoch before, and it gave no more than that end.
        put_generators(loader, began["loader"])
        put_random_state(began["random"])
        return started(loader, began, at.epoch, origin=self._origin)

    def _put_end(self, loader: Any, state: Mapping[str, Any]) -> None:
        """Put a loader where it was at the end of a pass."""
        if not is_indexed(loader) and keeper(loader) is not None and "loader" in state and not state.get("differs"):
            is_taken = ended(loader, state["loader"])
            if not is_taken and torch_loader(loader) is not None and not _is_over(state):
                what = f"the epoch before ended before the end of {type(loader).__name__}, which cannot be begun anew"
                self._origin.refuse(what, "goes on in that pass")
        put_generators(loader, state.get("generators", ()))

    def run_out(self) -> None:
        """The loader has no more batches."""
        self._is_over = True

    def end(self, drawn: int) -> None:
        """The epoch is over, after so many batches: what comes next is a pass of its own."""
        self._within = False
        self._left_off = {**self._left_off, "within": False}
        if self._loader is None and self._left_off.get("iterator"):
            is_shared, before = self._left_off["iterator"]
            self._left_off["iterator"] = [is_shared, before + drawn]
        self._iterator.drawn += drawn
        if not self._iterator.is_one:
            self._began = None

    # Taking and putting back

    def take(self) -> dict[str, Any]:
        """Return what `put` needs to go on from the boundary that the loop is at."""
        loader = self._loader
        if loader is None:
            return dict(self._left_off)
        return {
            "loader": take_generators(loader) if is_indexed(loader) else take_loader(loader),
            "generators": take_generators(loader),
            "began": self._began,
            "within": self._within,
            "over": self._is_over,
            "warm": is_warm(loader),
            "data": self._facts,
            "iterator": self._iterator.take(),
        }

    def put(self, state: Mapping[str, Any], origin: Resumed) -> None:
        """Let the next pass go on from there."""
        self._loader = self._began = None
        self._within, self._left_off, self._origin = False, dict(state), origin
        self._iterator = _Shared()


class _Shared:
    """How much was drawn of an iterator that several epochs share: it cannot begin anew for an epoch."""

    def __init__(self) -> None:
        self.is_one = False
        self.is_shared: bool | None = None
        """None until a second epoch shows it."""
        self.drawn = 0
        """Batches, in the epochs before this one."""

    def begin(self, loader: Any, before: Any, state: Mapping[str, Any], *, origin: Resumed) -> int:
        """Return how many batches the epochs before have drawn of this iterator, if it has to be wound forward."""
        self.is_one = isinstance(loader, Iterator) and not is_stateful(loader)
        if not self.is_one:
            self.is_shared, self.drawn = None, 0
            return 0
        if before is not None:
            self.is_shared = loader is before
            self.drawn = self.drawn if self.is_shared else 0
            return 0
        self.is_shared, self.drawn = state.get("iterator") or (None, 0)
        if self.is_shared is None and self.drawn and not state.get("over"):
            kind = type(loader).__name__
            origin.refuse(
                f"the data is a {kind}, which cannot begin anew, and the epoch before used {self.drawn} batches of "
                f"one: whether it is the same {kind} cannot be known. An iterable that begins anew for each epoch (a "
                "loader, a list, a class with __iter__), or one with state_dict and load_state_dict, can be resumed",
                "reads it on, as one that all epochs share",
            )
            self.is_shared = True
        if not self.is_shared:
            self.drawn = 0
        return self.drawn

    def take(self) -> list[Any] | None:
        return [self.is_shared, self.drawn] if self.is_one else None


def _is_over(state: Mapping[str, Any]) -> bool:
    """Return whether a pass has no more batches; a loader of torchdata may know it before it was asked for one more."""
    own = state.get("loader")
    if state.get("over") or not isinstance(own, Mapping):
        return bool(state.get("over"))
    # accelerate reads one batch ahead. A worker that has ended is asked again by torchdata, and may begin anew.
    workers = own.get("_snapshot", {}).get("_worker_snapshots", {}).values()
    ended = [(worker.get("fetcher_state") or {}).get("fetcher_ended", False) for worker in workers]
    return bool(own.get("_iterator_finished")) or (bool(ended) and all(ended))
