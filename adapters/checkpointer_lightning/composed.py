"""The whole composed policy in Lightning."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from checkpointer import CheckpointManager, HMACKey, KeepBest, Policy
from checkpointer.ports import Listener
from checkpointer.retention import KeepAll
from checkpointer_lightning import siblings
from checkpointer_lightning.managed import Managed, Moment
from checkpointer_lightning.writing import Pen

__all__ = ["Composed"]


class Composed(Managed):
    """Saves by a `checkpointer.Policy`: any triggers, any rules, several such callbacks in one Trainer.

    A training batch, a validation, the end of an epoch and the end of the training are each reported. A step that is
    saved before its validation is ranked after it, and a metric counts only for the step it was measured at. At the
    end of the training the state is saved if a rule keeps it.

    Args:
        directory: A local folder; None takes the logger's, or ``checkpoints`` in the Trainer's root.
        policy: When to save, what to keep and how to name.
        listeners: Told when a checkpoint is durable or gone, on rank 0.
        tolerate_failures: How many saves in a row may fail with a warning.
        trust: A key that signs each record.
        verbose: Log each decision.

    Example:
        >>> from checkpointer import AnyOf, EveryEpochs, EverySteps, KeepBest, KeepLast, Policy
        >>> policy = Policy(AnyOf(EveryEpochs(1), EverySteps(500)), [KeepBest(3, "val_loss", mode="min"), KeepLast(2)])
        >>> CheckpointCallback("runs/digits", policy)  # doctest: +SKIP
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None,
        policy: Policy,
        *,
        listeners: Iterable[Listener] = (),
        tolerate_failures: int = 0,
        trust: HMACKey | None = None,
        verbose: bool = False,
    ) -> None:
        best = next((rule for rule in policy.keep if isinstance(rule, KeepBest)), None)
        everything = any(isinstance(rule, KeepAll) for rule in policy.keep)
        monitor = best.metric.name if best else None
        super().__init__(
            directory,
            policy.name.template,
            monitor=monitor,
            mode=best.metric.mode if best else "min",
            save_top_k=-1 if everything else best.k if best else 1,
            save_last="link" if policy.last == "link" else bool(policy.last),
            save_weights_only=policy.contents == "weights",
            verbose=verbose,
        )
        self.policy = policy
        self._options: Mapping[str, Any] = {
            "listeners": tuple(listeners),
            "tolerate_failures": tolerate_failures,
            "trust": trust,
            "verbose": verbose,
        }
        siblings.introduce(self)

    @property
    def _base_key(self) -> str:
        return type(self).__qualname__

    def _make_policy(self) -> Policy:
        return self.policy

    def _make_manager(self, policy: Policy, pen: Pen, label: str) -> CheckpointManager:
        return CheckpointManager(self._folder, policy, save=pen, label=label, clock=self._clock, **self._options)

    def _reports(self, moment: Moment, trainer: Any) -> bool:
        return True

    def _ends_epoch(self, moment: Moment, trainer: Any) -> bool:
        # A training that stops within an epoch runs the hook too.
        return moment == "epoch" and bool(trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)

    def _due(self, moment: Moment) -> str:
        return "the training ends" if moment == "end" else ""
