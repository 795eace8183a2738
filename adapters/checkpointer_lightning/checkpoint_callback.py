"""The whole composed policy in Lightning."""

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from checkpointer import HMACKey, KeepBest, Policy
from checkpointer.commit.lease import LEASE_S
from checkpointer.mirror.plan import Mirror
from checkpointer.policy.retention import KeepAll
from checkpointer.ports import Listener
from checkpointer.save.background import Busy
from checkpointer.storage.opening import Where
from checkpointer_lightning.callback_base import CallbackBase
from checkpointer_lightning.session import Moment
from checkpointer_lightning.several_callbacks import is_local


class Composed(CallbackBase):
    """Saves by a `checkpointer.Policy`: any triggers, any rules, several such callbacks in one Trainer.

    The callback reports each training batch, each validation, the end of each epoch and the end of the training. If a
    step is saved before its validation, the checkpoint is ranked after the validation. A metric counts only for the
    step at which it was measured. At the end of the training the state is saved if a rule keeps it.

    Args:
        directory: A folder or an fsspec URL; None takes the logger's, or ``checkpoints`` in the Trainer's root.
        policy: When to save, what to keep and how to name. Or a policy as YAML (`Policy.to_yaml`): a path, or the text.
        listeners: Called on rank 0 when a checkpoint is durable or retired.
        tolerate_failures: How many saves in a row may fail with a warning before the training ends with an error.
        storage_options: What fsspec needs besides a URL, such as credentials; never logged or stored. The Trainer does
            not get these options. For ``ckpt_path="last"`` the callback makes a copy on this machine. If you pass a URL
            as ``ckpt_path``, fsspec takes the credentials from the environment.
        trust: A key that signs each record. A record without its signature is neither restored nor changed.
        mirror: A second place: a path, a URL, a storage or a `checkpointer.Mirror`. Checkpoints are copied there in the
            background. ``ckpt_path="last"`` fetches missing checkpoints from it.
        background: ``"wait"`` or ``"skip"``, as for `checkpointer.CheckpointManager`: the state is copied, a thread
            writes the copy, and the training goes on. Lightning's ``AsyncCheckpointIO`` sets ``"wait"``. Listeners
            are called on that thread.
        grace_s: Seconds between SIGTERM and the kill that follows it, if known. If SIGTERM stops the training, the end
            of the training waits for the mirror at most that long, counted from the end of the batch.
        takeover: Go on with the run even if another process trains it. That process gets a `FencedError` at its next
            save. None takes it from the environment variable ``CHECKPOINTER_TAKEOVER``.
        lease_s: Seconds without a heartbeat after which another process counts as dead. If the process that trains the
            run sends no heartbeat for that long, this training takes over the run.
        verbose: Log each decision at INFO instead of DEBUG (logger ``checkpointer``).

    Raises:
        PolicyError: If ``policy`` is YAML that is not a policy.

    Example:
        >>> from checkpointer import AnyOf, EveryEpochs, EverySteps, KeepBest, KeepLast, Policy
        >>> policy = Policy(AnyOf(EveryEpochs(1), EverySteps(500)), [KeepBest(3, "val_loss", mode="min"), KeepLast(2)])
        >>> CheckpointCallback("runs/digits", policy)  # doctest: +SKIP
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None,
        policy: Policy | str | Path,
        *,
        listeners: Iterable[Listener] = (),
        tolerate_failures: int = 0,
        storage_options: Mapping[str, Any] | None = None,
        trust: HMACKey | None = None,
        mirror: Mirror | Where | None = None,
        background: Busy | None = None,
        grace_s: float = math.inf,
        takeover: bool | None = None,
        lease_s: float = LEASE_S,
        verbose: bool = False,
    ) -> None:
        policy = policy if isinstance(policy, Policy) else Policy.from_yaml(policy)
        best = next((rule for rule in policy.keep if isinstance(rule, KeepBest)), None)
        keeps_all = any(isinstance(rule, KeepAll) for rule in policy.keep)
        super().__init__(
            dirpath=directory,
            filename=policy.name.template,
            monitor=best.metric.name if best else None,
            mode=best.metric.mode if best else "min",
            save_top_k=-1 if keeps_all else best.k if best else 1,
            save_last="link" if policy.last == "link" and is_local(str(directory or "")) else bool(policy.last),
            save_weights_only=policy.contents == "weights",
            verbose=verbose,
        )
        self.policy = policy
        self._background = background
        self._grace_s = grace_s
        self._options = {
            "listeners": tuple(listeners),
            "tolerate_failures": tolerate_failures,
            "storage_options": storage_options,
            "trust": trust,
            "mirror": mirror,
            "takeover": takeover,
            "lease_s": lease_s,
            "verbose": verbose,
        }
        if storage_options:
            # Lightning's own methods read the directory with it.
            self._fs = url_to_fs(self._folder, **{k: v for k, v in storage_options.items() if k != "retry"})[0]

    def _set_up_directory(self, trainer: Any, pl_module: Any, stage: str) -> None:
        # Lightning would make a filesystem without the options.
        if not (self._options["storage_options"] and self.dirpath):
            super()._set_up_directory(trainer, pl_module, stage)

    @property
    def _base_key(self) -> str:
        return type(self).__qualname__

    def _make_policy(self) -> Policy:
        return self.policy

    def _reports(self, moment: Moment, trainer: Any) -> bool:
        return True

    def _ends_epoch(self, moment: Moment, trainer: Any) -> bool:
        # The hook runs also if a training stops within an epoch.
        return moment == "epoch" and bool(trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)

    def _due(self, moment: Moment) -> str:
        return {"end": "the training ends", "asked": "asked for"}.get(moment, "")
