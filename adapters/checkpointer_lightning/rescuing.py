"""Saving what there is when an exception ends the training, and never in a way that could hide the exception."""

from __future__ import annotations

import os
import warnings
from typing import Any

from checkpointer import CheckpointerWarning, Save
from checkpointer_lightning.saving import Training

__all__ = ["rescue"]


def rescue(callback: Any, training: Training, trainer: Any, exception: BaseException) -> None:
    """Save a rescue checkpoint if the policy asks for it; a failure is a warning."""
    if training.manager is None or not training.manager.policy.rescue or not trainer.global_step:
        return
    if trainer.world_size > 1:
        # Saving needs every rank, and the others may be waiting elsewhere: the exception has to be seen instead.
        warnings.warn("no rescue checkpoint: one rank alone cannot save", CheckpointerWarning, stacklevel=4)
        return
    words = f"{type(exception).__name__}: {exception}"
    try:
        saved = training.manager.rescue(words, step=trainer.global_step, epoch=trainer.current_epoch)
    except Exception as failure:  # The error that ended the training is the one to be seen.
        msg = f"no rescue checkpoint could be written: {failure!r}"
        warnings.warn(msg, CheckpointerWarning, stacklevel=4)
        return
    if isinstance(saved, Save):
        path = os.path.join(callback._folder, saved.name)
        callback._package.info(
            f"An {type(exception).__name__} was raised with message: {exception}, saved checkpoint to {path}"
        )
