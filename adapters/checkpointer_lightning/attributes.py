"""The attributes of a checkpoint callback that loggers, the Trainer and users read, computed from the records."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable
from typing import Any, Final

import attrs
import torch
from torch import Tensor

from checkpointer import Manifest, Policy, Record
from checkpointer.policy.ranking import place

NAMES: Final = (
    "best_model_path",
    "best_model_score",
    "best_k_models",
    "kth_best_model_path",
    "kth_value",
    "last_model_path",
    "current_score",
)
"""The attributes that `Attributes.set_on` sets."""


ONLY_LAST: Final = "checkpointer/only_last"
"""Metric of a checkpoint that only ``last`` was due for, so that no rule looks at it."""


def competing(records: Iterable[Record]) -> tuple[Record, ...]:
    """Return the records that compete for the top k, which are those that rules may look at."""
    return tuple(record for record in records if ONLY_LAST not in record.metrics)


@attrs.frozen(kw_only=True)
class Attributes:
    """The values as plain numbers and text, because rank 0 sends them to the other ranks."""

    best: dict[str, float]
    """Path and score of the best k, in the order they were saved."""
    best_path: str
    kth_path: str
    last_path: str
    worst: float
    """The score that is worse than any other."""
    going: frozenset[str] = frozenset()
    """Paths that still exist, and will be retired once the pending saves are durable."""

    def set_on(self, callback: Any) -> None:
        """Set the attributes that Lightning's callback has. If the records do not have a value, it is kept."""
        if self.going:
            self._remove_going(callback)
        if self.best_path:
            callback.best_model_path = self.best_path
        if self.last_path:
            callback.last_model_path = self.last_path
        if not self.best:
            return
        callback.best_k_models = {path: _tensor(score) for path, score in self.best.items()}
        callback.best_model_score = callback.best_k_models[self.best_path]
        callback.current_score = _tensor(list(self.best.values())[-1])
        callback.kth_best_model_path = self.kth_path
        callback.kth_value = _tensor(self.best.get(self.kth_path, self.worst))

    def _remove_going(self, callback: Any) -> None:
        kept = {path: score for path, score in callback.best_k_models.items() if path not in self.going}
        callback.best_k_models = kept
        if callback.best_model_path in self.going:
            callback.best_model_path, callback.best_model_score = "", None
        if callback.kth_best_model_path in self.going:
            callback.kth_best_model_path = ""


def attributes_of(
    policy: Policy, manifest: Manifest, directory: str, top_k: int, going: Collection[str] = frozenset()
) -> Attributes:
    """Return the attributes for some records; ``top_k`` as Lightning has it, -1 for all.

    Names in ``going`` are left out, because they will be retired.
    """
    slot = policy.name.last_file if policy.last else None
    history = [record for record in competing(manifest.history) if record.name != slot and record.name not in going]
    ranked = policy.best_first(history)
    top = ranked if top_k < 0 else policy.top(history)
    in_order = sorted(top, key=lambda record: record.serial)
    best = {os.path.join(directory, record.name): _score(policy, record) for record in in_order}
    newest_first = top if policy.ranking else history[::-1]
    is_full = bool(best) and top_k in (-1, len(best))
    ranking = policy.ranking
    worst = max(ranking.scored(in_order), key=lambda one: place(one[0]))[1] if ranking and is_full else None
    return Attributes(
        best=best,
        best_path=os.path.join(directory, newest_first[0].name) if newest_first else "",
        kth_path=os.path.join(directory, worst.name) if worst else "",
        last_path=os.path.join(directory, slot) if slot and manifest.history else "",
        worst=_worst(policy),
        going=frozenset(os.path.join(directory, name) for name in going),
    )


def _worst(policy: Policy) -> float:
    return -math.inf if policy.ranking and policy.ranking.mode == "max" else math.inf


def _score(policy: Policy, record: Record) -> float:
    ranking = policy.ranking
    value = ranking.value(record) if ranking else None
    assert value is not None, f"{record.name} is ranked"
    if math.isnan(value):
        return _worst(policy)
    return int(value) if ranking and ranking.key in ("step", "epoch") else value


def _tensor(value: float) -> Tensor:
    if isinstance(value, int):
        return torch.tensor(value)
    single = torch.tensor(value, dtype=torch.float32)
    return single if single.item() == value else torch.tensor(value, dtype=torch.float64)
