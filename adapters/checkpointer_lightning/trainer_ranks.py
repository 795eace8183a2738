"""The ranks of a Trainer."""

from __future__ import annotations

from typing import Any

import attrs
import torch
import torch.distributed as dist

from checkpointer.distributed.ranks import OneRank, TorchRanks
from checkpointer.ports import Ranks


@attrs.frozen
class _StrategyRanks:
    """The ranks of a strategy that does not use ``torch.distributed``."""

    trainer: Any

    @property
    def rank(self) -> int:
        return int(self.trainer.global_rank)

    @property
    def size(self) -> int:
        return int(self.trainer.world_size)

    def broadcast(self, value: Any) -> Any:
        return self.trainer.strategy.broadcast(value)

    def gather(self, value: Any) -> list[Any]:
        return [self.trainer.strategy.broadcast(value, src=rank) for rank in range(self.size)]

    def highest(self, *values: float) -> tuple[float, ...]:
        strategy = self.trainer.strategy
        numbers = torch.tensor(values, dtype=torch.float32, device=strategy.root_device)
        return tuple(float(value) for value in strategy.reduce(numbers, reduce_op="max"))

    def barrier(self, timeout_s: float) -> bool:
        return False  # A strategy has no barrier with a timeout.


def open_ranks(trainer: Any) -> Ranks:
    """Return the ranks of a Trainer; every rank calls it, at the same place."""
    if trainer.world_size == 1:
        return OneRank()
    return TorchRanks() if dist.is_available() and dist.is_initialized() else _StrategyRanks(trainer)
