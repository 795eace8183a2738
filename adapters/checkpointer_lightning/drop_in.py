"""Lightning's ``ModelCheckpoint``, argument for argument, with decisions that are a policy's."""

from __future__ import annotations

import inspect
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Optional, Union

import attrs

from checkpointer import Attach, Decision, DuringEpochs, EveryEpochs, Policy, Save
from checkpointer.naming import fixed_parts
from checkpointer_lightning import siblings
from checkpointer_lightning.identity import Identity
from checkpointer_lightning.managed import Managed, Moment
from checkpointer_lightning.showing import Account

__all__ = ["DropIn"]


class DropIn(Managed):
    """Takes the place of Lightning's ``ModelCheckpoint``: the same arguments, attributes, names and state.

    Where Lightning loses data or misleads, this does not; ``docs/lightning.md`` lists each difference.

    Args:
        dirpath: Folder; None takes the logger's, or ``checkpoints`` in the Trainer's root.
        filename: Template; None means ``{epoch}-{step}``.
        monitor: Metric to rank by.
        verbose: Say what is saved, and what is not.
        save_last: Let ``last`` name the newest state, as a copy without bytes of its own or as a link (``"link"``).
        save_top_k: How many of the best to keep; -1 all, 0 none.
        save_on_exception: Save when an exception ends the training, under a name of its own.
        save_weights_only: Leave out what a resume needs.
        mode: ``"min"`` or ``"max"``.
        auto_insert_metric_name: Write ``name=value`` in names.
        every_n_train_steps: Optimizer steps between saves.
        train_time_interval: Time between saves.
        every_n_epochs: Epochs between saves.
        save_on_train_epoch_end: Save at the end of the epoch, or of the validation; None decides by the Trainer.
        enable_version_counter: Add ``-v1`` to a name that is taken, instead of replacing this run's.
    """

    # Optional and Union as in Lightning, whose command line reads them on every Python it supports.
    def __init__(
        self,
        dirpath: Optional[Union[str, Path]] = None,  # noqa: UP045, UP007
        filename: Optional[str] = None,  # noqa: UP045
        monitor: Optional[str] = None,  # noqa: UP045
        verbose: bool = False,
        save_last: Optional[Union[bool, Literal["link"]]] = None,  # noqa: UP045, UP007
        save_top_k: int = 1,
        save_on_exception: bool = False,
        save_weights_only: bool = False,
        mode: str = "min",
        auto_insert_metric_name: bool = True,
        every_n_train_steps: Optional[int] = None,  # noqa: UP045
        train_time_interval: Optional[timedelta] = None,  # noqa: UP045
        every_n_epochs: Optional[int] = None,  # noqa: UP045
        save_on_train_epoch_end: Optional[bool] = None,  # noqa: UP045
        enable_version_counter: bool = True,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        # Lightning 2.4 does not know all of them yet.
        known = inspect.signature(super(Identity, self).__init__).parameters
        super().__init__(**{name: value for name, value in given.items() if name in known})
        self.save_on_exception = save_on_exception
        siblings.introduce(self)

    @property
    def _base_key(self) -> str:
        return str(super(Identity, self).state_key)

    def _make_policy(self) -> Policy:
        policy = Policy.from_flags(
            monitor=self.monitor,
            mode="max" if self.mode == "max" else "min",
            save_top_k=self.save_top_k,
            save_last=self.save_last,
            every_n_train_steps=self._every_n_train_steps,
            every_n_epochs=self._every_n_epochs,
            train_time_interval=self._train_time_interval,
            filename=self.filename or None,
            auto_insert_metric_name=self.auto_insert_metric_name,
            enable_version_counter=self._enable_version_counter,
            save_weights_only=self.save_weights_only,
            save_on_exception=self.save_on_exception,
        )
        naming = attrs.evolve(
            policy.name,
            join=self.CHECKPOINT_JOIN_CHAR,
            equals=self.CHECKPOINT_EQUALS_CHAR,
            extension=self.FILE_EXTENSION,
            first_version=self.STARTING_VERSION,
            last=fixed_parts(self.CHECKPOINT_NAME_LAST, self.CHECKPOINT_JOIN_CHAR) or policy.name.last,
            slashes="keep",
        )
        when = policy.when
        # Lightning saves at each validation of an epoch that counts, and in no other epoch.
        return attrs.evolve(policy, name=naming, when=DuringEpochs(when.n) if isinstance(when, EveryEpochs) else when)

    # What is reported

    def _reports(self, moment: Moment, trainer: Any) -> bool:
        if not self._every_n_epochs or moment == "end":
            return True
        return moment == ("epoch" if self._should_save_on_train_epoch_end(trainer) else "validation")

    def _ends_epoch(self, moment: Moment, trainer: Any) -> bool:
        # By Lightning's words an epoch that counts by epochs ends with each of its validations.
        return moment == "epoch" or (moment == "validation" and bool(self._every_n_epochs))

    def _due(self, moment: Moment) -> str:
        return "the training ends" if moment == "end" and self.save_last and not self._last_checkpoint_saved else ""

    # What is said

    def _follow(self, trainer: Any, decision: Decision, account: Account) -> None:
        if self.verbose and self.monitor is not None and (words := self._words(trainer, decision, account)):
            self._package.info(words)
        super()._follow(trainer, decision, account)

    def _words(self, trainer: Any, decision: Decision, account: Account) -> str:
        now = f"Epoch {trainer.current_epoch}, global step {trainer.global_step}: {self.monitor!r}"
        if isinstance(decision, Save) and self.monitor in decision.observation.metrics and account.best:
            reached, best = decision.observation.metrics[self.monitor], account.best[account.best_path]
            path = f"{self._folder}/{decision.name}"
            return f"{now} reached {reached:0.5f} (best {best:0.5f}), saving model to {path!r} as top {self.save_top_k}"
        if not isinstance(decision, (Save, Attach)) and decision.due and not decision.waiting:
            return f"{now} was not in top {self.save_top_k}"
        return ""

    # State that another callback left

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Take over the state of a callback that ranked the same, if its other arguments have changed since."""
        states = checkpoint.get("callbacks") or {}
        keys = {callback.state_key for callback in trainer.callbacks}
        if self.state_key in states:
            return
        for key, state in states.items():
            if not isinstance(key, str) or key in keys or not key.startswith(f"{type(self).__qualname__}{{"):
                continue
            if state.get("monitor") == self.monitor and f"'mode': {self.mode!r}" in key:
                self.load_state_dict(deepcopy(state))
                return
