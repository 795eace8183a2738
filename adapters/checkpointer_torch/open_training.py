"""Opens the state of a training, after a check that its processes have the same training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from checkpointer.distributed.ranks import on_every_rank
from checkpointer.distributed.team import check_alike
from checkpointer.errors import PolicyError
from checkpointer.manager_options import MANAGER_OPTIONS, check_options
from checkpointer.ports import Ranks
from checkpointer_torch.sharded_state import ShardedState
from checkpointer_torch.training_state import TrainingState

_SET_BY_LOOP: Final = ("state", "weights", "save")
"""Arguments of `CheckpointManager` that the loop sets itself."""


def _check_names(objects: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Refuse an object with the name of an option: it would be saved as state, and the option would do nothing."""
    check_options(options, "Loop", own=_SET_BY_LOOP)
    for name in objects:
        if name in MANAGER_OPTIONS and name != "state":
            how = "the Loop sets it itself" if name in _SET_BY_LOOP else f"pass options={{{name!r}: ...}}"
            msg = f"{name!r} is an option of CheckpointManager: {how}; an object of the training needs another name"
            raise PolicyError(msg)


def open_training(
    objects: Mapping[str, Any], ranks: Ranks, *, config: Any, options: Mapping[str, Any]
) -> TrainingState:
    """Return the training's state, after a check that it is the same training on every rank."""
    opened: list[TrainingState] = []

    def open_() -> bool:
        _check_names(objects, options)
        training = TrainingState(objects, ranks, config)
        shards, format = training.objects.shards, options.get("format", "dcp")
        if shards and ranks.size == 1:
            msg = f"{shards[0]} is a shard, and other processes hold the other shards: pass their ranks, not {ranks!r}"
            raise PolicyError(msg)
        if shards and format != "dcp":
            msg = (
                f"{shards[0]} is a shard, and other processes hold the other shards: format {format!r} would save "
                "only this one. Leave format out of options=, or pass 'dcp'"
            )
            raise PolicyError(msg)
        opened.append(training)
        return bool(shards)

    is_sharded = any(on_every_rank(ranks, open_)) or options.get("format") == "dcp"
    (training,) = opened
    check_alike(ranks, {"objects": ", ".join(training.objects.names), **training.objects.shapes})
    if is_sharded:
        training.sharded = ShardedState(training, ranks.rank, ranks.size)
    return training
