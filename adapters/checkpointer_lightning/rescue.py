"""Saving what there is when something ends the training, and never in a way that could hide what it was.

With several ranks: after a SIGTERM all save together, at a batch that they agreed on. After an exception rank 0 saves
alone where it has all of the state and nobody's hook may need the others; else all ranks save if all of them are there
within a second, and nobody does if one is missing.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Any, Final

from checkpointer import CheckpointerWarning, CheckpointManager, Decision, Save
from checkpointer_lightning.save import Saving, Training

__all__ = ["quietly", "rescue", "rescue_together"]

DEADLINE_S: Final = 1.0
"""Seconds that a rank with an exception waits for the others to have one too."""


def rescue(callback: Saving, training: Training, trainer: Any, exception: BaseException) -> None:
    """Save a rescue checkpoint if the policy asks for it; a failure is a warning."""
    if not training.rescues or not trainer.global_step:
        return
    if training.ranks.size > 1:
        if _needs_all(callback, trainer):
            if not _is_everybody_here(training, trainer):
                if training.ranks.rank == 0:
                    _warn("no rescue checkpoint: saving takes all ranks, and not all of them came")
                return
        elif training.ranks.rank:
            return
        else:
            training.pen.is_alone = True
    name = type(exception).__name__
    saved = rescue_together(callback, training, trainer, f"{name}: {exception}")
    if isinstance(saved, Save):
        path = os.path.join(callback._folder, saved.name)
        callback._package.info(f"An {name} was raised with message: {exception}, saved checkpoint to {path}")


def rescue_together(callback: Saving, training: Training, trainer: Any, why: str) -> Decision | None:
    """Save a rescue checkpoint on all ranks, all of which call this at one step; or on one that is alone."""

    def act(manager: CheckpointManager) -> Decision:
        step, epoch = trainer.global_step, trainer.current_epoch
        return manager.rescue(why, step=step, epoch=epoch, timeout=callback._grace.left)

    try:
        return act(training.managing) if training.ranks.size == 1 or training.pen.is_alone else training.lead(act)
    except Exception as failure:  # What ended the training is to be seen.
        if trainer.is_global_zero:
            _warn(f"no rescue checkpoint could be written: {failure!r}")
        return None


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Turn a failure into a warning: what ended the training is to be seen."""
    try:
        yield
    except Exception as failure:
        _warn(str(failure))


def _needs_all(callback: Saving, trainer: Any) -> bool:
    """Return whether a rank alone cannot take the state: it is spread over ranks, or somebody's hook may need them."""
    if not callback._package.writes_plainly(trainer):
        return True
    if any(type(optimizer).__name__ == "ZeroRedundancyOptimizer" for optimizer in trainer.optimizers):
        return True
    theirs = [trainer.lightning_module, trainer.datamodule, *trainer.callbacks]
    return any(_has_hook(thing) for thing in theirs if thing is not None)


def _has_hook(thing: Any) -> bool:
    """Return whether a hook that runs when the state is taken is somebody's own, not one of Lightning's."""
    hook = getattr(type(thing), "on_save_checkpoint", None)
    module = str(getattr(hook, "__module__", ""))
    return hook is not None and module.partition(".")[0] not in ("lightning", "pytorch_lightning")


def _is_everybody_here(training: Training, trainer: Any) -> bool:
    """Return whether all ranks come here in time, and from the same step."""
    if not training.ranks.barrier(DEADLINE_S):
        return False
    step = float(trainer.global_step)
    highest, lowest = training.ranks.highest(step, -step)
    return highest == -lowest


def _warn(msg: str) -> None:
    warnings.warn(msg, CheckpointerWarning, stacklevel=5)
