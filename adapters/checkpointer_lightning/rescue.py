"""Saving the state when something ends the training, in a way that never hides the reason.

After a SIGTERM several ranks save together, at a batch that they agreed on. After an exception rank 0 saves alone if it
has all of the state and no user's hook may need the other ranks. Else all ranks save, if all of them come within a
second; if one is missing, no rank saves.
"""

from __future__ import annotations

import os
from typing import Any

from checkpointer import Decision, Save
from checkpointer.distributed.team import BARRIER_S, all_come
from checkpointer.errors import ConflictError, warn
from checkpointer_lightning.session import TrainingSession
from checkpointer_lightning.several_callbacks import ours


def stop(session: TrainingSession) -> None:
    """Save on all ranks a rescue of each callback, and let each rank raise Lightning's exception."""
    for callback in ours(session.trainer.callbacks):
        if callback._session is not None:
            callback._session.grace.begin()
            if not session.signals.requeued:
                _rescue_together(callback._session, "SIGTERM")
    session.signals.stop(session.trainer)


def rescue(session: TrainingSession, exception: BaseException) -> None:
    """Save a rescue checkpoint if the policy asks for it. A failure is a warning."""
    if isinstance(exception, ConflictError):  # Another process trains the run.
        return
    if session.ranks.size > 1 and session.may_rescue:
        if not _needs_all(session):
            if session.ranks.rank:
                return
            session.io.is_alone = True
        elif not all_come(session.ranks, session.trainer.global_step):
            if session.ranks.rank == 0:
                step = session.trainer.global_step
                warn(f"no rescue checkpoint: not all ranks reached step {step} within {BARRIER_S:g} s")
            return
    name = type(exception).__name__
    saved = _rescue_together(session, f"{name}: {exception}")
    if isinstance(saved, Save):
        path = os.path.join(session.callback._folder, saved.name)
        session.callback._package.log(f"An {name} was raised with message: {exception}, saved checkpoint to {path}")


def _rescue_together(session: TrainingSession, why: str) -> Decision | None:
    """Save a rescue on all ranks, all of which call this at one step; or on rank 0 alone."""
    if not session.may_rescue:
        return None
    trainer = session.trainer

    def act() -> Decision:
        step, epoch = trainer.global_step, trainer.current_epoch
        return session.managing.rescue(why, step=step, epoch=epoch, timeout=session.grace.left)

    try:
        return act() if session.io.is_alone else session.io.team.work(act)
    except Exception as failure:  # It must not hide what ended the training.
        if trainer.is_global_zero:
            warn(f"no rescue checkpoint could be written: {failure!r}")
        return None


def _needs_all(session: TrainingSession) -> bool:
    """Return whether rank 0 alone cannot take the state: ranks share it, or a user's hook may need all ranks."""
    trainer = session.trainer
    if not session.callback._package.writes_plainly(trainer):
        return True
    if any(type(optimizer).__name__ == "ZeroRedundancyOptimizer" for optimizer in trainer.optimizers):
        return True
    return any(map(_has_hook, [trainer.lightning_module, trainer.datamodule, *trainer.callbacks]))


def _has_hook(thing: Any) -> bool:
    """Return whether taking the state calls a hook of this object that is not Lightning's own."""
    hook = getattr(type(thing), "on_save_checkpoint", None)
    module = str(getattr(hook, "__module__", ""))
    return hook is not None and module.partition(".")[0] not in ("lightning", "pytorch_lightning")
