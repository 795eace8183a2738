"""Lightning's ``ModelCheckpoint`` with the same arguments; a policy makes the decisions."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Literal, Optional, Union

import attrs

from checkpointer import (
    Decision,
    DuringEpochs,
    EveryEpochs,
    KeepBest,
    Policy,
    Record,
    Save,
    Skip,
)
from checkpointer._secrets import shown_place
from checkpointer.errors import warn
from checkpointer.policy.naming import fixed_parts
from checkpointer.policy.retention import Rule
from checkpointer_lightning.attributes import ONLY_LAST, Attributes, competing
from checkpointer_lightning.callback_base import CallbackBase
from checkpointer_lightning.session import Moment


class DropIn(CallbackBase):
    """Replaces Lightning's ``ModelCheckpoint``: it has the same arguments, attributes, names and state.

    It behaves differently only if Lightning would lose data, or show a wrong value. ``docs/lightning.md`` lists each
    difference.

    Args:
        dirpath: Folder for the checkpoints; None takes the logger's, or ``checkpoints`` in the Trainer's root.
        filename: Template; None means ``{epoch}-{step}``.
        monitor: Metric to rank by.
        verbose: Log each decision, to save or not to save.
        save_last: Make an alias ``last`` of the newest checkpoint. True makes a hard link on a disk and a server-side
            copy in a bucket; ``"link"`` makes a symlink.
        save_top_k: How many of the best to keep; -1 all, 0 none.
        save_on_exception: Save when an exception ends the training, under a name of its own.
        save_weights_only: Save the weights without the optimizers, schedulers and loops. A resume needs all of them.
        mode: ``"min"`` or ``"max"``.
        auto_insert_metric_name: Write ``name=value`` in names.
        every_n_train_steps: Optimizer steps between saves.
        train_time_interval: Time between saves, as a `datetime.timedelta`.
        every_n_epochs: Epochs between saves.
        save_on_train_epoch_end: True saves at the end of the epoch, False at the end of the validation. With None, the
            Trainer's settings decide.
        enable_version_counter: If a name is taken, True adds ``-v1`` to the new name. False replaces the earlier
            checkpoint of this run.

    Raises:
        MisconfigurationException: For the same arguments as Lightning's ``ModelCheckpoint``, such as two of the three
            intervals together.

    Example:
        >>> ModelCheckpoint("runs/digits", monitor="val_loss", save_top_k=3, save_last=True)  # doctest: +SKIP
    """

    _is_asking: bool = False
    _candidates: dict[str, Any] | None = None
    """What the top k are decided by; None if an override has left this step out."""
    _unknown: frozenset[str] = frozenset()
    """Fields of the template that were not reported, and that a warning has named."""

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
        known = inspect.signature(super(CallbackBase, self).__init__).parameters
        super().__init__(**{name: value for name, value in given.items() if name in known})
        self.save_on_exception = save_on_exception

    @property
    def _base_key(self) -> str:
        return str(super(CallbackBase, self).state_key)

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
        # Lightning saves at each validation of every n-th epoch, and not in the other epochs.
        if isinstance(when, EveryEpochs):
            # The alias last is due at each, also if the top k are not.
            when = DuringEpochs(1 if self.save_last else when.n)
        return attrs.evolve(policy, name=naming, when=when, keep=[_limited(rule) for rule in policy.keep])

    # What is reported

    def _reports(self, moment: Moment, trainer: Any) -> bool:
        if not self._every_n_epochs or moment == "end":
            return True
        return moment == ("epoch" if self._should_save_on_train_epoch_end(trainer) else "validation")

    def _ends_epoch(self, moment: Moment, trainer: Any) -> bool:
        # In Lightning, with every_n_epochs, each validation ends the epoch.
        return moment == "epoch" or (moment == "validation" and bool(self._every_n_epochs))

    def _due(self, moment: Moment) -> str:
        if moment == "end" and self.save_last and not self._last_checkpoint_saved:
            return "the training ends"
        return "asked for" if moment == "asked" else ""

    # Overridden methods

    def _ask(self, moment: Moment, trainer: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        """Call the methods that subclasses override, and mark the metrics if only ``last`` is due."""
        is_due = moment == "end" or self._every_n_epochs < 2 or (trainer.current_epoch + 1) % self._every_n_epochs == 0
        if is_due and self._is_overridden and self._last_global_step_saved != trainer.global_step:
            candidates = self._monitor_candidates(trainer)
            before = dict(candidates)
            self._candidates = None
            self._is_asking = True
            try:
                if moment != "end":
                    self._save_topk_checkpoint(trainer, candidates)
                self._save_last_checkpoint(trainer, candidates)
            finally:
                self._is_asking = False
            is_due = moment == "end" or self._candidates is not None
            after: dict[str, Any] = self._candidates or {}
            metrics = {**metrics, **{k: v for k, v in after.items() if k not in before or before[k] is not v}}
        return metrics if is_due else {**metrics, ONLY_LAST: 1.0}

    @property
    def _is_overridden(self) -> bool:
        names = ("_save_topk_checkpoint", "_save_last_checkpoint")
        return any(name in vars(self) or getattr(type(self), name) is not getattr(DropIn, name) for name in names)

    def _save_topk_checkpoint(self, trainer: Any, monitor_candidates: dict[str, Any]) -> None:
        """Let this step compete for the top k. A subclass may skip that, or change what it is ranked by."""
        if self._is_asking:
            self._candidates = dict(monitor_candidates)
        elif self._session is not None:
            self._session.report("asked")

    def _save_last_checkpoint(self, trainer: Any, monitor_candidates: dict[str, Any]) -> None:
        """Save now, if user code calls it. ``last`` names the newest state whether or not it is called."""
        if not self._is_asking and self._session is not None and self.save_last:
            self._session.report("asked")

    # Manual optimization

    def _dump(self, trainer: Any) -> dict[str, Any]:
        dump, module, session = super()._dump(trainer), trainer.lightning_module, self._session
        if module.automatic_optimization or session is None or session.moment != "batch":
            return dump
        saved_models = getattr(module, "saved_models", None)
        if isinstance(saved_models, dict) and saved_models:
            return _before_step(saved_models[max(saved_models)], dump)
        if self._every_n_train_steps and trainer.is_global_zero:
            warn(_AFTER, UserWarning)
        return dump

    # Messages

    def _log_decision(self, trainer: Any, decision: Decision, attributes: Attributes) -> None:
        if self.verbose and self.monitor is not None and (message := self._message(trainer, decision, attributes)):
            self._package.log(message)
        if isinstance(decision, Save):
            self._warn_of_unknown(decision)

    def _warn_of_unknown(self, decision: Save) -> None:
        """Warn of the fields of the template that were not reported: in names they are 0."""
        manager = self._session.manager if self._session is not None else None
        if manager is None or decision.name in manager.policy.aliases:
            return
        naming, seen = manager.policy.name, manager.session.manifest.seen
        known = manager.policy.known_metrics.union(seen, decision.observation.metrics, self._unknown)
        have = ", ".join(sorted(seen - {"epoch", "step", ONLY_LAST})) or "none"
        for key in (key for key in naming.keys if key not in known):
            self._unknown |= {key}
            msg = f"the template {self.filename!r} asks for {key!r}, which was not reported (have: {have}): it is 0"
            warn(msg)

    def _message(self, trainer: Any, decision: Decision, attributes: Attributes) -> str:
        now = f"Epoch {trainer.current_epoch}, global step {trainer.global_step}: {self.monitor!r}"
        if isinstance(decision, Save):
            reached = decision.observation.metrics.get(self.monitor or "")
            if reached is None or ONLY_LAST in decision.observation.metrics or not attributes.best:
                return ""
            best, path = attributes.best[attributes.best_path], shown_place(f"{self._folder}/{decision.name}")
            return f"{now} reached {reached:0.5f} (best {best:0.5f}), saving model to {path!r} as top {self.save_top_k}"
        is_rejected = isinstance(decision, Skip) and decision.due and not decision.waiting
        return f"{now} was not in top {self.save_top_k}" if is_rejected else ""

    # State of another callback

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Load the state of a callback that ranked by the same metric, if other arguments have changed since."""
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


class _Best(KeepBest):
    """Ranks the records that compete."""

    def eligible(self, records: Iterable[Record]) -> tuple[Record, ...]:
        return competing(super().eligible(records))


@attrs.frozen
class _Others:
    """Applies a rule to the records that compete."""

    rule: Rule

    def keep(self, history: Sequence[Record]) -> Mapping[str, str]:
        return self.rule.keep(competing(history))

    def __str__(self) -> str:
        return str(self.rule)


def _limited(rule: Any) -> Any:
    if not isinstance(rule, KeepBest):
        return _Others(rule)
    metric = rule.metric
    return _Best(rule.k, metric.key, mode=metric.mode, ties=metric.ties, after_step=rule.after_step)


def _before_step(captured: Any, dump: dict[str, Any]) -> dict[str, Any]:
    """Return the dump with the weights that ``training_step`` captured before the optimizer stepped.

    They are the state of ``module.layer``, or of the whole module, or of a part of either. The module is not changed.
    """
    if not isinstance(captured, Mapping):
        msg = f"module.saved_models holds a {type(captured).__name__}; a saved model state must be a dictionary"
        raise TypeError(msg)
    weights = dump["state_dict"]
    for prefix in ("layer.", ""):
        named = {prefix + name: value for name, value in captured.items()}
        if named.keys() <= weights.keys():
            return {**dump, "state_dict": {**weights, **named}}
    unknown = sorted(captured.keys() - weights.keys())
    msg = (
        f"module.saved_models has {', '.join(map(repr, unknown[:3]))}, which neither the module nor its layer has; "
        "the state after the optimizer's step is saved instead"
    )
    warn(msg)
    return dump


def make_on_use(name: str, namespace: dict[str, Any]) -> Any:
    """Make the class ``ModelCheckpoint`` of a module when it is first used.

    LightningCLI looks a short class name up among all classes that exist, so ours must not exist earlier.
    """
    if name != "ModelCheckpoint":
        msg = f"module {namespace['__name__']!r} has no attribute {name!r}"
        raise AttributeError(msg)
    body = {"__module__": namespace["__name__"], "__doc__": DropIn.__doc__, "_package": namespace["_PACKAGE"]}
    return namespace.setdefault(name, type(name, (DropIn, namespace["Theirs"]), body))


_AFTER: Final = (
    "Using ModelCheckpoint with manual optimization and every_n_train_steps, but no pre-optimization state was saved. "
    "The checkpoint will contain the model state AFTER optimization. To save the pre-optimization state, put a copy of "
    "it into self.saved_models[batch_idx] in training_step before optimizer.step()."
)
"""Lightning's message, shortened."""
