"""The processes of one training, and how they communicate: in a process group of their own."""

from __future__ import annotations

import time
import uuid
from datetime import timedelta
from typing import Any

import attrs

from checkpointer.distributed.team import Agreement, Team, on_every_rank, on_rank_zero
from checkpointer.errors import ClosedError, RanksError

__all__ = ["Agreement", "OneRank", "Team", "TorchMailbox", "TorchRanks", "on_every_rank", "on_rank_zero"]


@attrs.frozen
class OneRank:
    """A training of one process."""

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

    Its messages do not wait for the GPU, and do not mix with the training's own collectives. The constructor is a
    collective: every rank calls it, at the same place.

    Args:
        group: The process group; None takes the default one.
        timeout_s: If a rank does not answer for so many seconds, the other ranks raise an error.

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
        self._dist = dist
        members = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
        self.rank, self.size = dist.get_rank(group), len(members)
        self._first = members[0]
        self._timeout_s = timeout_s
        # Two groups that are made at once, apart from each other, must not get one name: they would share store keys.
        apart = self.size < dist.get_world_size()
        self._group = dist.new_group(
            members, timeout=timedelta(seconds=timeout_s), backend="gloo", use_local_synchronization=apart
        )

    @property
    def group(self) -> Any:
        """The gloo process group, for what needs one."""
        if self._group is None:
            msg = "these ranks are closed"
            raise ClosedError(msg)
        return self._group

    def broadcast(self, value: Any) -> Any:
        """See `Ranks.broadcast`."""
        box = [value if self.rank == 0 else None]
        self._dist.broadcast_object_list(box, src=self._first, group=self.group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """See `Ranks.gather`."""
        values: list[Any] = [None] * self.size
        self._dist.all_gather_object(values, value, group=self.group)
        return values

    def highest(self, *values: float) -> tuple[float, ...]:
        """See `Ranks.highest`."""
        import torch

        # On the CPU whatever the default device is: the group is gloo's.
        tensor = torch.tensor(values, dtype=torch.float64, device="cpu")
        self._dist.all_reduce(tensor, op=self._dist.ReduceOp.MAX, group=self.group)
        return tuple(tensor.tolist())

    def barrier(self, timeout_s: float) -> bool:
        """See `Ranks.barrier`."""
        import torch

        # Not monitored_barrier: only rank 0 has its timeout there, the other ranks wait as long as the group does.
        end = time.monotonic() + timeout_s
        token, dist = torch.zeros(1, device="cpu"), self._dist

        def passes(start: Any, peer: int) -> bool:
            work = start(token, dist.get_global_rank(self.group, peer), self.group)
            return work is not None and bool(work.wait(timedelta(seconds=max(end - time.monotonic(), 0.001))))

        peers = [0] if self.rank else range(1, self.size)
        order = (dist.isend, dist.irecv) if self.rank else (dist.irecv, dist.isend)
        try:
            return all(passes(start, peer) for start in order for peer in peers)
        except Exception:  # gloo has an error for a late rank and one for a dead rank, and most are RuntimeErrors.
            return False

    def mailbox(self) -> TorchMailbox:
        """See `SupportsMailbox.mailbox`."""
        return TorchMailbox(self.group, timeout_s=self._timeout_s)

    def close(self) -> None:
        """Destroy the group without communication. A second call does nothing."""
        group, self._group = self._group, None
        if group is not None and self._dist.is_initialized():
            self._dist.destroy_process_group(group)


class TorchMailbox(TorchRanks):
    """Messages in the store that the processes used to find each other, and a group for their threads."""

    def __init__(self, group: Any, *, timeout_s: float) -> None:
        from torch.distributed import distributed_c10d as c10d

        super().__init__(group, timeout_s=timeout_s)
        # An earlier training may have left messages in the store, under groups of the same names.
        token = self.broadcast(uuid.uuid4().hex)
        # All ranks poll this store. Its one connection is blocked while a rank waits in it.
        self._store = c10d.PrefixStore(token, c10d._get_process_group_store(self.group))

    def post(self, key: str, message: str) -> None:
        """See `Mailbox.post`."""
        self._store.set(key, message)

    def look(self, key: str) -> str | None:
        """See `Mailbox.look`."""
        return self._store.get(key).decode() if self._store.check([key]) else None
