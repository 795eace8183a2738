"""An evaluation within a training: a signal to stop ends it after a batch, and the next training runs it again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from checkpointer_torch.random_state import put_random_state, take_random_state

from checkpointer.distributed.ranks import Agreement
from checkpointer.ports import Ranks

_SAME_SIZE: Final = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer types by their size (bytes)."""


class EvaluationEnded(BaseException):
    """Ends an evaluation after a batch, on every rank; `attach` catches it.

    It is not an `Exception`, so an ``except Exception`` in an ``evaluate`` does not catch it.
    """


class Watch:
    """Watches one evaluation, and ends it after a batch if a rank has to stop.

    Args:
        model: The model that is evaluated.
        ranks: The processes; each calls `look` after each of its batches.
        is_asked: Returns whether this rank was asked to stop.
    """

    def __init__(self, model: torch.nn.Module, ranks: Ranks, is_asked: Callable[[], bool]) -> None:
        self._model, self._ranks, self._is_asked = model, ranks, is_asked
        self._agreement = Agreement(ranks)
        self._random = take_random_state()
        self._weights = _sums(model)

    def look(self) -> None:
        """Raise `EvaluationEnded` on every rank if a rank was asked to stop, and every rank has its own weights.

        An evaluation of an average of the weights goes on: the average would be saved in the place of the weights.
        """
        if self._agreement(self._is_asked()) and all(self._ranks.gather(_sums(self._model) == self._weights)):
            raise EvaluationEnded

    def undo(self) -> None:
        """Set the random numbers back to where the evaluation began."""
        put_random_state(self._random)


def _sums(model: torch.nn.Module) -> list[int]:
    """Return the sum of each trained weight's bits. One pass over the weights: less than a batch costs."""
    sums = []
    for weight in model.parameters():
        if weight.requires_grad:
            local: torch.Tensor = weight.to_local() if hasattr(weight, "to_local") else weight
            bits = local.detach().reshape(-1).view(_SAME_SIZE.get(local.element_size(), torch.int8))
            sums.append(int(bits.sum(dtype=torch.int64)))
    return sums
