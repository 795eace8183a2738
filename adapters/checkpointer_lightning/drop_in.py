"""Lightning's ``ModelCheckpoint``, argument for argument, with decisions that are a policy's."""

import inspect
import warnings
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Optional, Union

import attrs

from checkpointer import Attach, CheckpointerWarning, Decision, DuringEpochs, EveryEpochs, Policy, Save, Skip
from checkpointer.policy.naming import fixed_parts
from checkpointer_lightning import siblings
from checkpointer_lightning.attributes import ShownState
from checkpointer_lightning.callback_base import CallbackBase, Moment
from checkpointer_lightning.identity import Identity
from checkpointer_lightning.manual_optimization import before_step, has_captured
from checkpointer_lightning.top_k import ONLY_LAST, with_competitors

__all__ = ["DropIn"]


class DropIn(CallbackBase):
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

    _is_asking: bool = False
    _consent: dict[str, Any] | None = None
    """What the top k are to be decided by, if they are asked at all."""
    _unknown: frozenset[str] = frozenset()
    """Fields of the template that nobody has reported, and that were said."""

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
        if isinstance(when, EveryEpochs):
            # Whatever the top k wait for, last is due at each.
            when = DuringEpochs(1 if self.save_last else when.n)
        return with_competitors(attrs.evolve(policy, name=naming, when=when))

    # What is reported

    def _reports(self, moment: Moment, trainer: Any) -> bool:
        if not self._every_n_epochs or moment == "end":
            return True
        return moment == ("epoch" if self._should_save_on_train_epoch_end(trainer) else "validation")

    def _ends_epoch(self, moment: Moment, trainer: Any) -> bool:
        # By Lightning's words an epoch that counts by epochs ends with each of its validations.
        return moment == "epoch" or (moment == "validation" and bool(self._every_n_epochs))

    def _due(self, moment: Moment) -> str:
        if moment == "end" and self.save_last and not self._last_checkpoint_saved:
            return "the training ends"
        return "asked for" if moment == "asked" else ""

    # What is asked, and of whom

    def _ask(self, moment: Moment, trainer: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        """Ask the methods that subclasses override, and say whether the top k are due or ``last`` alone."""
        is_due = moment == "end" or self._every_n_epochs < 2 or (trainer.current_epoch + 1) % self._every_n_epochs == 0
        if is_due and self._is_overridden and self._last_global_step_saved != trainer.global_step:
            candidates = self._monitor_candidates(trainer)
            before = dict(candidates)
            self._consent = None
            self._is_asking = True
            try:
                if moment != "end":
                    self._save_topk_checkpoint(trainer, candidates)
                self._save_last_checkpoint(trainer, candidates)
            finally:
                self._is_asking = False
            is_due = moment == "end" or self._consent is not None
            metrics = {**metrics, **_changed(before, self._consent or {})}
        return metrics if is_due else {**metrics, ONLY_LAST: 1.0}

    @property
    def _is_overridden(self) -> bool:
        names = ("_save_topk_checkpoint", "_save_last_checkpoint")
        return any(name in vars(self) or getattr(type(self), name) is not getattr(DropIn, name) for name in names)

    def _save_topk_checkpoint(self, trainer: Any, monitor_candidates: dict[str, Any]) -> None:
        """Let this step compete for the top k. A subclass may leave that out, or change what it is ranked by."""
        if self._is_asking:
            self._consent = dict(monitor_candidates)
        elif self._training is not None:
            self._report("asked", trainer)

    def _save_last_checkpoint(self, trainer: Any, monitor_candidates: dict[str, Any]) -> None:
        """Save now, if it is called by others: ``last`` names the newest state whether or not it is called."""
        if not self._is_asking and self._training is not None and self.save_last:
            self._report("asked", trainer)

    # What is saved

    def _dump(self, trainer: Any) -> dict[str, Any]:
        dump, module = super()._dump(trainer), trainer.lightning_module
        if module.automatic_optimization or not self._at_batch:
            return dump
        if has_captured(module):
            return before_step(module, dump)
        if self._every_n_train_steps and trainer.is_global_zero:
            warnings.warn(_AFTER, UserWarning, stacklevel=2)
        return dump

    # What is said

    def _follow(self, trainer: Any, decision: Decision, account: ShownState) -> None:
        if self.verbose and self.monitor is not None and (words := self._words(trainer, decision, account)):
            self._package.info(words)
        if isinstance(decision, Save):
            self._warn_of_unknown(decision)
        super()._follow(trainer, decision, account)

    def _warn_of_unknown(self, decision: Save) -> None:
        """Say which fields of the template nobody has reported: in names they are 0."""
        training = self._training
        if training is None or training.manager is None or decision.name in training.manager.policy.aliases:
            return
        policy, manifest = training.manager.policy, training.manager.session.manifest
        known = policy.known_metrics.union(manifest.seen, decision.observation.metrics)
        have = ", ".join(sorted(manifest.seen - {"epoch", "step", ONLY_LAST})) or "none"
        for key in (key for key in policy.name.keys if key not in known and key not in self._unknown):
            self._unknown = self._unknown | {key}
            msg = f"the template {self.filename!r} asks for {key!r}, which was not reported (have: {have}): it reads 0"
            warnings.warn(msg, CheckpointerWarning, stacklevel=2)

    def _words(self, trainer: Any, decision: Decision, account: ShownState) -> str:
        now = f"Epoch {trainer.current_epoch}, global step {trainer.global_step}: {self.monitor!r}"
        ranks = not isinstance(decision, Skip) and ONLY_LAST not in decision.observation.metrics
        if isinstance(decision, Save) and ranks and self.monitor in decision.observation.metrics and account.best:
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


def _changed(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in after.items() if name not in before or before[name] is not value}


_AFTER = (
    "Using ModelCheckpoint with manual optimization and every_n_train_steps, but no pre-optimization state was saved. "
    "The checkpoint will contain the model state AFTER optimization. To save the pre-optimization state, put a copy of "
    "it into self.saved_models[batch_idx] in training_step before optimizer.step()."
)
"""Lightning's words, shortened."""
