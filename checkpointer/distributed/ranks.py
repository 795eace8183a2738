"""Several processes of one training: they talk seldom, and an error on one of them is never waited out."""

from __future__ import annotations

import contextlib
import functools
import math
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar, cast

import attrs

from checkpointer.errors import ClosedError, RanksError, portable
from checkpointer.ports import Ranks

__all__ = ["Agreement", "OneRank", "Team", "TorchMailbox", "TorchRanks", "on_every_rank", "on_rank_zero"]

T = TypeVar("T")


@attrs.frozen
class OneRank:
    """A training of one process: nobody to talk to."""

    @property
    def rank(self) -> int:
        """See `Ranks.rank`."""
        return 0

    @property
    def size(self) -> int:
        """See `Ranks.size`."""
        return 1

    def broadcast(self, value: Any) -> Any:
        """See `Ranks.broadcast`."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """See `Ranks.gather`."""
        return [value]

    def highest(self, *values: float) -> tuple[float, ...]:
        """See `Ranks.highest`."""
        return values

    def barrier(self, timeout_s: float) -> bool:
        """See `Ranks.barrier`."""
        return True


class TorchRanks:
    """The processes of a ``torch.distributed`` group, over a gloo group of their own.

    What is said here neither waits for the GPU nor mixes with the training's own collectives. Making one is a
    collective: every rank does, at the same place.

    Args:
        group: The process group; None takes the default one.
        timeout_s: Seconds after which a rank that does not answer is an error on the others.

    Raises:
        RanksError: If ``torch.distributed`` is not initialised.

    Example:
        >>> import torch.distributed as dist
        >>> store = dist.HashStore()
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> ranks = TorchRanks()
        >>> ranks.rank, ranks.size, ranks.gather("here")
        (0, 1, ['here'])
        >>> ranks.close()
        >>> dist.destroy_process_group()
    """

    def __init__(self, group: Any = None, *, timeout_s: float = 1800.0) -> None:
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            msg = "torch.distributed is not initialised; call init_process_group first, or use OneRank()"
            raise RanksError(msg)
        members = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
        self._rank, self._size = dist.get_rank(group), len(members)
        self._first = members[0]
        self._timeout_s = timeout_s
        # Two groups that are made at once, apart from each other, must not get one name: they would meet in the store.
        apart = self._size < dist.get_world_size()
        self._group = dist.new_group(
            members, timeout=timedelta(seconds=timeout_s), backend="gloo", use_local_synchronization=apart
        )

    @property
    def rank(self) -> int:
        """See `Ranks.rank`."""
        return self._rank

    @property
    def size(self) -> int:
        """See `Ranks.size`."""
        return self._size

    @property
    def group(self) -> Any:
        """The gloo process group, for what needs one."""
        if self._group is None:
            msg = "these ranks are closed"
            raise ClosedError(msg)
        return self._group

    def broadcast(self, value: Any) -> Any:
        """See `Ranks.broadcast`."""
        import torch.distributed as dist

        box = [value if self._rank == 0 else None]
        dist.broadcast_object_list(box, src=self._first, group=self.group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """See `Ranks.gather`."""
        import torch.distributed as dist

        values: list[Any] = [None] * self._size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def highest(self, *values: float) -> tuple[float, ...]:
        """See `Ranks.highest`."""
        import torch
        import torch.distributed as dist

        # On the CPU whatever the default device is: the group is gloo's.
        tensor = torch.tensor(values, dtype=torch.float64, device="cpu")
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tuple(tensor.tolist())

    def barrier(self, timeout_s: float) -> bool:
        """See `Ranks.barrier`."""
        # Not monitored_barrier: only rank 0 has its timeout there, the others wait as long as the group does.
        give_up = time.monotonic() + timeout_s
        try:
            if self._rank:
                self._pass(give_up, to=0)
                self._pass(give_up, from_=0)
                return True
            for rank in range(1, self._size):
                self._pass(give_up, from_=rank)
            for rank in range(1, self._size):
                self._pass(give_up, to=rank)
        except Exception:  # Late, or dead: gloo has an error for each, and a plain RuntimeError for most.
            return False
        return True

    def _pass(self, give_up: float, *, to: int | None = None, from_: int | None = None) -> None:
        """Send a word to a rank, or get one, before the time is up (seconds of `time.monotonic`)."""
        import torch
        import torch.distributed as dist

        word = torch.zeros(1, device="cpu")
        if to is not None:
            work = dist.isend(word, dist.get_global_rank(self.group, to), self.group)
        else:
            assert from_ is not None, "one of the two"
            work = dist.irecv(word, dist.get_global_rank(self.group, from_), self.group)
        left = max(give_up - time.monotonic(), 0.001)
        if work is None or not work.wait(timedelta(seconds=left)):
            msg = f"rank {to if from_ is None else from_} has not come in time"
            raise RanksError(msg)

    def mailbox(self) -> TorchMailbox:
        """See `SupportsMailbox.mailbox`."""
        return TorchMailbox(TorchRanks(self.group, timeout_s=self._timeout_s))

    def close(self) -> None:
        """Give the group back. Talks to nobody; a second call does nothing."""
        import torch.distributed as dist

        group, self._group = self._group, None
        if group is not None and dist.is_initialized():
            dist.destroy_process_group(group)


class TorchMailbox:
    """Words in the store through which the processes have found each other.

    Args:
        ranks: Ranks that nothing else uses.
    """

    def __init__(self, ranks: TorchRanks) -> None:
        from torch.distributed import distributed_c10d as c10d

        self._ranks = ranks
        # What an earlier training has left in the store is not for this one, though its groups had the same names.
        token = ranks.broadcast(uuid.uuid4().hex)
        # Nobody waits in it: it has one connection, and whoever waits there keeps all others waiting.
        self._store = c10d.PrefixStore(token, c10d._get_process_group_store(ranks.group))

    @property
    def group(self) -> Any:
        """See `Mailbox.group`."""
        return self._ranks.group

    def post(self, key: str, message: str) -> None:
        """See `Mailbox.post`."""
        self._store.set(key, message)

    def look(self, key: str) -> str | None:
        """See `Mailbox.look`."""
        return self._store.get(key).decode() if self._store.check([key]) else None

    def gather(self, value: Any) -> list[Any]:
        """See `Mailbox.gather`."""
        return self._ranks.gather(value)

    def close(self) -> None:
        """See `Mailbox.close`."""
        self._ranks.close()


def on_rank_zero(ranks: Ranks, work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0 and return its result on every rank; its error is raised on every rank.

    Example:
        >>> on_rank_zero(OneRank(), lambda: 1 + 1)
        2
    """
    return Team(ranks, {}).work(work)


def on_every_rank(ranks: Ranks, work: Callable[[], T]) -> list[T]:
    """Run ``work`` on every rank and return all results on every rank; if it fails on one, every rank raises.

    Whatever is a collective in ``work`` has to end on every rank by itself when one of them fails.
    """
    if ranks.size == 1:
        return [work()]
    result, error = _attempt(work)
    outcomes = ranks.gather(_portable((result, error)))
    if error is not None:
        raise error
    for rank, (_, failure) in enumerate(outcomes):
        if failure is not None:
            msg = f"rank {rank} failed: {failure!r}"
            raise RanksError(msg) from failure
    return [result for result, _ in outcomes]


@attrs.frozen
class Team:
    """Rank 0 works, and calls the others wherever it takes all of them: to take a state, to write or read shards.

    Args:
        ranks: The processes.
        acts: What they may be called for, by name; each is run on every rank with rank 0's arguments.
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
        result, error = outcome = _attempt(work)
        try:
            self.ranks.broadcast(("", _portable(outcome)))
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
            with contextlib.suppress(Exception):  # Rank 0 has it too, and says what comes of it.
                on_every_rank(self.ranks, functools.partial(self.acts[act], *args))


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # The others would wait for ever: they have to hear of it first.
        return None, error


def _portable(outcome: tuple[Any, Exception | None]) -> tuple[Any, Exception | None]:
    """Return an outcome that reaches the other ranks."""
    result, error = outcome
    return outcome if error is None else (result, portable(error))


@attrs.define
class Agreement:
    """Tells all ranks at the same step that something has happened on one of them, for next to nothing.

    Every rank calls it once per step, with what has happened there; all get the same answer. Most calls cost a
    comparison: the ranks talk every m-th time only, and m follows from what talking costs and how long a step takes.

    Args:
        ranks: Who has to agree.
        share: How much of the training's time talking may cost, as far as the ranks see it themselves; that waking up
            costs more than they see is why it is so little.
        patience_s: At most so many seconds lie between two talks, as long as a step is shorter than that.
        clock: Seconds, for measuring.

    Example:
        >>> agreement = Agreement(OneRank())
        >>> agreement(False), agreement(True)
        (False, True)
    """

    ranks: Ranks
    share: float = attrs.field(default=0.002, kw_only=True)
    patience_s: float = attrs.field(default=1.0, kw_only=True)
    clock: Callable[[], float] = attrs.field(default=time.perf_counter, kw_only=True)
    talks: int = attrs.field(default=0, init=False)
    """How often the ranks have talked."""
    _left: int = attrs.field(default=1, init=False)
    _every: int = attrs.field(default=1, init=False)
    _flag: bool = attrs.field(default=False, init=False)
    _own: float = attrs.field(default=math.inf, init=False)
    """Seconds that the last talk took here."""
    _costs: deque[float] = attrs.field(factory=lambda: deque(maxlen=16), init=False)
    """Seconds that each of the last talks took the rank that came to it last: the same on all ranks."""
    _since: float | None = attrs.field(default=None, init=False)

    @property
    def cost_s(self) -> float:
        """Seconds that talking costs the training each time; infinite before it is known."""
        return sum(self._costs) / len(self._costs) if self._costs else math.inf

    def __call__(self, flag: bool) -> bool:
        """Return whether ``flag`` was true on any rank since the ranks last talked; False between two talks."""
        if self.ranks.size == 1:
            return flag
        self._flag = self._flag or flag
        self._left -= 1
        if self._left > 0:
            return False
        return self._talk()

    def _talk(self) -> bool:
        before = self.clock()
        any_flag, every, least = self.ranks.highest(float(self._flag), float(self._wanted(before)), -self._own)
        after = self.clock()
        # A rank that comes early waits for the latest, as it would in the step itself: what it takes the latest, which
        # waits for nobody, is what talking costs.
        if math.isfinite(least):
            self._costs.append(-least)
        self._own = after - before
        self._since = after
        self._every = self._left = int(every)
        self._flag = False
        self.talks += 1
        return bool(any_flag)

    def _wanted(self, now: float) -> int:
        """Return every how many steps this rank would talk."""
        if self._since is None:
            return 1
        step_s = max((now - self._since) / self._every, 1e-9)
        if self.cost_s == math.inf:
            return 1
        affordable = math.ceil(self.cost_s / (self.share * step_s))
        # Not more than twice as seldom as before: a step that was short by chance must not silence all for long.
        return int(max(1, min(affordable, self.patience_s / step_s, 2 * self._every)))
