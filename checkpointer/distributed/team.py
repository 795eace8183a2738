"""Rank 0 leads: it works while the other ranks wait, calls them where all are needed, and broadcasts the result."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final, Generic, TypeVar, cast

import attrs

from checkpointer.errors import RanksError, portable
from checkpointer.policy.triggers import Horizon
from checkpointer.ports import Ranks

T = TypeVar("T")

BARRIER_S: Final = 1.0
"""Seconds that a rank with an error waits for the other ranks, so that they write a rescue checkpoint together."""


_ALIKE: Final = "All ranks run the same program with the same arguments, and rank 0 decides for all of them"


@attrs.frozen
class Broadcast(Generic[T]):
    """What rank 0 sends to every rank after it has worked for a manager."""

    result: T
    horizon: Horizon
    """Below it nothing is due, so no rank has to communicate."""
    view: Any
    """What the manager shows on every rank."""


def on_rank_zero(ranks: Ranks, work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0 and return its result on every rank; its error is raised on every rank.

    Example:
        >>> from checkpointer.distributed.ranks import OneRank
        >>> on_rank_zero(OneRank(), lambda: 1 + 1)
        2
    """
    return Team(ranks, {}).work(work)


def on_every_rank(ranks: Ranks, work: Callable[[], T]) -> list[T]:
    """Run ``work`` on every rank and return all results on every rank; if it fails on one, every rank raises.

    If ``work`` contains a collective and one rank fails, the collective has to end on the other ranks by itself.
    """
    if ranks.size == 1:
        return [work()]
    result, error = _attempt(work)
    outcomes = ranks.gather((result, None if error is None else portable(error)))
    if error is not None:
        raise error
    for rank, (_, failure) in enumerate(outcomes):
        if failure is not None:
            msg = f"rank {rank} failed: {failure!r}"
            raise RanksError(msg) from failure
    return [result for result, _ in outcomes]


def check_alike(ranks: Ranks, facts: Mapping[str, str | None]) -> None:
    """Raise on every rank if the ranks do not have the same facts; None counts as the same as anything.

    Raises:
        RanksError: It names the first rank and fact that differ.
    """
    if ranks.size == 1:
        return
    digest = hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()
    if len(set(ranks.gather(digest))) == 1:
        return
    first, *others = ranks.gather(dict(facts))
    for rank, theirs in enumerate(others, 1):
        for name in (*first, *theirs):
            here, there = first.get(name, "not there"), theirs.get(name, "not there")
            if None not in (here, there) and here != there:
                msg = f"rank {rank} differs from rank 0: {name} is {there} there, and {here} on rank 0. {_ALIKE}"
                raise RanksError(msg)


def all_come(ranks: Ranks, place: object) -> bool:
    """Return whether all ranks come here in time, and at the same place. Otherwise one may wait elsewhere."""
    return ranks.barrier(BARRIER_S) and 1 == len(set(ranks.gather(place)))


@attrs.frozen
class Team:
    """Rank 0 works, and calls the other ranks to take a state, or to write or read shards.

    Args:
        ranks: The processes.
        acts: What all ranks may be called for, by name. Each act runs on every rank with rank 0's arguments.
    """

    ranks: Ranks
    acts: Mapping[str, Callable[..., None]]

    def work(self, work: Callable[[], T]) -> T:
        """Run ``work`` on rank 0 while the others wait for its calls; return its result, or raise, on every rank."""
        if self.ranks.size == 1:
            return work()
        return self._lead(work) if self.ranks.rank == 0 else cast(T, self._follow())

    def call(self, act: str, *args: Any) -> None:
        """Within ``work``, on rank 0: let every rank run an act; raise if it fails on one of them."""
        if self.ranks.size > 1:
            self.ranks.broadcast((act, args))
        on_every_rank(self.ranks, lambda: self.acts[act](*args))

    def _lead(self, work: Callable[[], T]) -> T:
        result, error = _attempt(work)
        try:
            self.ranks.broadcast(("", (result, None if error is None else portable(error))))
        except Exception:
            if error is None:
                raise
        if error is not None:
            raise error
        return cast(T, result)

    def _follow(self) -> Any:
        while True:
            act, args = self.ranks.broadcast(None)
            if not act:
                result, error = args
                if error is not None:
                    raise error
                return result
            with contextlib.suppress(Exception):  # Rank 0 gets the error too, and broadcasts the outcome.
                on_every_rank(self.ranks, functools.partial(self.acts[act], *args))


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # The other ranks must receive it before it is raised here: they wait.
        return None, error


@attrs.define
class Agreement:
    """Reports to all ranks at the same step that a flag is set on one of them, at almost no cost.

    Every rank calls it once per step with its own flag, and all ranks get the same answer. Most calls cost a
    comparison: the ranks communicate at every m-th call, and m follows from the cost of that and the time of a step.

    Args:
        ranks: The processes that agree.
        share: Part of the training's time that communication may cost, as the ranks measure it. It is small because
            waking up costs more than the ranks can measure.
        patience_s: Seconds between two exchanges at most, as long as a step is shorter than that.
        clock: Seconds, for measuring.

    Example:
        >>> from checkpointer.distributed.ranks import OneRank
        >>> agreement = Agreement(OneRank())
        >>> agreement(False), agreement(True)
        (False, True)
    """

    ranks: Ranks
    share: float = attrs.field(default=0.002, kw_only=True)
    patience_s: float = attrs.field(default=1.0, kw_only=True)
    clock: Callable[[], float] = attrs.field(default=time.perf_counter, kw_only=True)
    num_exchanges: int = attrs.field(default=0, init=False)
    """How often the ranks have communicated."""
    _left: int = attrs.field(default=1, init=False)
    _every: int = attrs.field(default=1, init=False)
    _flag: bool = attrs.field(default=False, init=False)
    _own: float = attrs.field(default=math.inf, init=False)
    """Seconds that the last exchange took on this rank."""
    _costs: deque[float] = attrs.field(factory=lambda: deque(maxlen=16), init=False)
    """Seconds that each of the last exchanges took on the rank that began it last: the same on all ranks."""
    _since: float | None = attrs.field(default=None, init=False)

    @property
    def cost_s(self) -> float:
        """Seconds that an exchange costs the training; infinite before it is known."""
        return sum(self._costs) / len(self._costs) if self._costs else math.inf

    def __call__(self, flag: bool) -> bool:
        """Return whether ``flag`` was true on any rank since the last exchange; False between two exchanges."""
        if self.ranks.size == 1:
            return flag
        self._flag = self._flag or flag
        self._left -= 1
        return self._left <= 0 and self._exchange()

    def _exchange(self) -> bool:
        before = self.clock()
        any_flag, every, least = self.ranks.highest(float(self._flag), float(self._wanted(before)), -self._own)
        after = self.clock()
        # A rank that is early waits for the latest one, as it would in the step itself. The latest rank does not wait,
        # so the time that it takes is the cost.
        if math.isfinite(least):
            self._costs.append(-least)
        self._own = after - before
        self._since = after
        self._every = self._left = int(every)
        self._flag = False
        self.num_exchanges += 1
        return bool(any_flag)

    def _wanted(self, now: float) -> int:
        """Return after how many steps this rank wants the next exchange."""
        if self._since is None or not self._costs:
            return 1
        step_s = max((now - self._since) / self._every, 1e-9)
        affordable = math.ceil(self.cost_s / (self.share * step_s))
        # At most twice the last interval: one step that was short by chance must not stop the exchanges for long.
        return int(max(1, min(affordable, self.patience_s / step_s, 2 * self._every)))
