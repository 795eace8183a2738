"""The place in the training data: which batch comes next, in a pass that can be resumed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import attrs

from checkpointer.errors import MismatchError
from checkpointer_torch.foreign_loaders import is_stateful
from checkpointer_torch.loader_facts import facts_of
from checkpointer_torch.loader_view import LoaderView
from checkpointer_torch.random_state import put_random_state, take_random_state
from checkpointer_torch.skip_batches import DataPass, ResumedFrom, is_over, mark_of, num_iters, put_start, values_of

_OF_A_RANK: Final = {"batches", "dataset length", "replicas"}
"""Facts that change with the number of processes."""


class DataPosition:
    """The training data's loader and the pass through it.

    A pass is made again from the random states it began with. The batches that were used are skipped by their
    indices; a loader with a ``state_dict`` goes on by itself; any other iterable is read again.
    """

    def __init__(self) -> None:
        self.used = self.given = 0
        """Batches of this epoch that finished steps have used, and that the loop has got."""
        self.is_accumulating = False
        """Whether a step has used more than one batch."""
        self._view: LoaderView | None = None
        self._facts: Mapping[str, Any] = {}
        self._began: Mapping[str, Any] | None = None
        self._within = self._is_over = False
        self._mark: Sequence[Any] = (0, "")
        """The number and the mark of the last batch that was given before the checkpoint."""
        self._newest: tuple[int, Any] | None = None
        """The number and a few values of the last batch that was given since; only of data that is read again."""
        self._is_read_again = False
        self._left_off: dict[str, Any] = {}
        self._origin = ResumedFrom()
        self._before = _Before()
        self._iterator = _SharedIterator()

    # A pass

    def begin(self, view: LoaderView, epoch: int) -> Iterator[Any]:
        """Return the batches of the epoch: all, or those left after ``used`` if a pass was left within."""
        self.given = self.used = self._settle(view)
        state, before = self._left_off, self._view
        now = take_random_state()
        if state.get("within") and self._origin.random is not None:
            # The epoch's body may have drawn before it asked for its batches. The process that was left did so too.
            put_random_state(self._origin.random)
        try:
            return self._begun(view, state, epoch)
        except MismatchError:
            self._left_off, self._view = state, before
            put_random_state(now)
            raise

    def _settle(self, view: LoaderView) -> int:
        """Compare the loader with the one that was left, and return how many of its batches were used."""
        then, now = self._left_off.get("data", {}), facts_of(view)
        other = {name: (then[name], now[name]) for name in then if name in now and then[name] != now[name]}
        if self._is_of_other_ranks or "replicas" in other:
            self._move(view, then, now)
            other = {name: values for name, values in other.items() if name not in _OF_A_RANK}
        state, origin, used = self._left_off, self._origin, self.used
        if not other:
            return used
        text = ", ".join(f"{name} {there!r} then, {here!r} now" for name, (there, here) in other.items())
        if not state.get("within"):
            origin.warn(f"the data differs from that of the previous epoch: {text}; the new epoch uses the new data")
            self._left_off = {**state, "differs": True}
            return used
        what = f"{_batches(used)} of this epoch {'was' if used == 1 else 'were'} read from other data: {text}"
        there, here = other.get("batch size", (1, 1))
        if set(other) <= {"batch size", "batches", "workers"} and there and here and view.is_indexed:
            nearest: int = used * there // here
            origin.refuse(what, f"goes on at the nearest sample, after {_batches(nearest)}")
            return nearest
        origin.refuse(what, "begins the epoch anew")
        self._left_off = {}
        return 0

    @property
    def _is_of_other_ranks(self) -> bool:
        here = self._origin.ranks[1]
        saved, _ = self._left_off.get("at", (here, 0))
        return bool(saved != here)

    def _move(self, view: LoaderView, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Find the place of this process in the data that another number of processes has begun."""
        state, origin = self._left_off, self._origin
        saved, used = state.get("at", (origin.ranks[1], self.used))
        of_a_sampler = saved if "DistributedSampler" in str(then.get("sampler")) else None
        replicas = then.get("replicas") or of_a_sampler, now.get("replicas")
        if replicas[0] == replicas[1] and (replicas[0] or origin.is_alike):
            self.used = used
            return
        self._left_off = {**state, "differs": True}
        what = f"the place in {view.kind} is that of one of {saved} processes, and {origin.ranks[1]} go on"
        is_movable = view.distributed_sampler is not None and None not in replicas
        if not state.get("within"):
            if not (is_movable or view.is_indexed or view.stateful is None):
                origin.refuse(f"{what}, so its state cannot be moved", "begins it anew")
        elif is_movable and now.get("dataset length") == then.get("dataset length"):
            self._before = self._before.after(used, then["batch size"] * replicas[0], now["batch size"] * replicas[1])
            self.used = self._before.batches
            self._left_off["began"] = None
        else:
            why = "only with torch's DistributedSampler over the same data is the share of each process known"
            origin.refuse(f"{what}, so it cannot be moved: {why}", f"goes on after {_batches(self.used)} of each")

    def _begun(self, view: LoaderView, state: Mapping[str, Any], epoch: int) -> Iterator[Any]:
        used_before = self._iterator.begin(view, self._view, state, origin=self._origin)
        differs = state.get("differs") or self._is_of_other_ranks
        self._mark = (0, "") if differs else state.get("mark", (0, ""))
        self._left_off = {}
        self._view, self._facts = view, facts_of(view)
        self._is_read_again, self._newest = not view.is_indexed and view.stateful is None, None
        view.set_epoch(epoch)
        data_pass = DataPass(view, epoch, self._origin, self._before.samples)
        is_within = bool(state.get("within"))
        used_up = is_within and view.is_used_up(self.used)
        if used_up:  # Its own state may be the beginning of the next pass already.
            state = {**state, "over": True}
        self._within, self._is_over = True, is_within and is_over(state)
        if is_within:
            self._began = state["began"]
        if self._is_over:
            data_pass.put_end(state)
            self._left_off = {**state, "within": False} if used_up else {}
            return iter(())
        if self._before.samples:
            self._began = self._began or _beginning(view)
            return data_pass.go_on_by_index({**state, "began": self._began}, self.used - self._before.batches)
        if not is_within or (view.is_indexed and not self.used):
            return self._begin_anew(data_pass, state, used_before)
        # A stateful loader may come from a checkpoint that has no state of it: then it is skipped like another.
        if view.is_indexed and state["began"]:
            return data_pass.go_on_by_index(state, used_before + self.used)
        if view.stateful is not None:
            return data_pass.go_on_by_state(state, used_before + self.used)
        mark = self._mark[1] if self._mark[0] == self.used else ""
        return data_pass.go_on_by_reading(state["began"] or {}, used_before + self.used, mark)

    def _begin_anew(self, data_pass: DataPass, state: Mapping[str, Any], used: int) -> Iterator[Any]:
        view = data_pass.view
        if state.get("within"):  # Its first batch was not used: the pass is made again.
            put_start(view, state["began"])
        elif state:
            data_pass.put_end(state)
        began = self._began or state.get("began")
        if not (self._iterator.is_shared and began):
            began = _beginning(view, is_warm=state.get("warm", False))
        self._began = began
        if used:
            return data_pass.go_on_by_reading(began, used)
        batches = data_pass.begin(began)
        if not state or view.stateful is None:
            return batches
        for first in batches:
            return itertools.chain([first], batches)
        put_start(view, began)  # The loader has taken the state over, and that was the end of its pass: begin anew.
        return data_pass.begin(began)

    def give(self, batch: Any = None) -> None:
        """Count a batch that the loop gets."""
        if self.given > self.used:
            self.is_accumulating = True  # The batch before had no step of its own.
        self.given += 1
        if self._is_read_again:
            self._newest = self.given, values_of(batch)

    def run_out(self) -> None:
        """Note that the loader has no more batches."""
        self._is_over = True

    def end(self) -> None:
        """End the epoch; the next one is a pass of its own."""
        self._within = False
        self._left_off = {**self._left_off, "within": False}
        if self._view is None and self._left_off.get("iterator"):
            is_shared, before = self._left_off["iterator"]
            self._left_off["iterator"] = [is_shared, before + self.given]
        self._iterator.drawn += self.given
        if not self._iterator.is_one:
            self._began = None
        self.used = self.given = 0
        self._before = _Before()

    # Taking and putting back

    def take(self) -> dict[str, Any]:
        """Return what `put` needs to go on from the boundary that the loop is at."""
        view = self._view
        if view is None:
            return dict(self._left_off)
        return {
            "loader": view.take_generators() if view.is_indexed or self._before.samples else view.take(),
            "generators": view.take_generators(),
            "began": self._began,
            "ahead": view.take_ahead(self.used) if self._within else [],
            "within": self._within,
            "over": self._is_over,
            "warm": view.is_warm,
            "mark": list(self._mark if self._newest is None else (self._newest[0], mark_of(self._newest[1]))),
            "data": self._facts,
            "iterator": [self._iterator.is_shared, self._iterator.drawn] if self._iterator.is_one else None,
            "before": [self._before.samples, self._before.batches],
        }

    def put(self, state: Mapping[str, Any], origin: ResumedFrom) -> None:
        """Let the next pass go on from there."""
        self.given = self.used
        self._view, self._began, self._is_read_again = None, None, False
        # "at" is there already if the checkpoint before was resumed, and its data was not asked for.
        self._left_off = {"at": [origin.ranks[0], origin.used], **state}
        self._within, self._origin = False, origin
        self._before = _Before(*state.get("before", ()))
        self._iterator = _SharedIterator()


def _beginning(view: LoaderView, *, is_warm: bool = False) -> dict[str, Any]:
    """Return what a pass that begins now can be made again from."""
    warm = view.is_warm or is_warm
    began = {"random": take_random_state(), "loader": view.take_generators(), "warm": warm}
    return {**began, "iters": num_iters(view, is_warm=warm)}


@attrs.frozen
class _Before:
    """What another number of processes has used of an epoch."""

    samples: int = 0
    """Of all processes together."""
    batches: int = 0
    """As how many batches of each process these samples count now."""

    def after(self, used: int, then: int, now: int) -> _Before:
        """Return the same after a change of processes, from the samples in a batch of all: then, and now."""
        samples = self.samples + (used - self.batches) * then
        return _Before(samples, samples // now)


@attrs.define
class _SharedIterator:
    """The count of batches drawn from an iterator that several epochs share: it cannot begin anew for an epoch."""

    is_one: bool = False
    is_shared: bool | None = None
    """None until a second epoch shows it."""
    drawn: int = 0
    """Batches, in the epochs before this one."""

    def begin(
        self, view: LoaderView, before: LoaderView | None, state: Mapping[str, Any], *, origin: ResumedFrom
    ) -> int:
        """Return how many batches the epochs before have drawn from this iterator, if it has to be read again."""
        loader = view.loader
        # Ray's wrapper of a DataLoader is its own iterator, and begins anew for each epoch.
        self.is_one = view.inner is None and isinstance(loader, Iterator) and not is_stateful(loader)
        if not self.is_one:
            self.is_shared, self.drawn = None, 0
            return 0
        if before is not None:
            self.is_shared = loader is before.loader
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


def _batches(count: int) -> str:
    return f"{count} batch" if count == 1 else f"{count} batches"
