"""What a checkpoint says of a callback, and what a training goes on from."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Final, Literal

from checkpointer import CheckpointManager, Policy
from checkpointer.policy.naming import fixed_parts
from checkpointer_lightning import siblings
from checkpointer_lightning.checkpoint_path import LOOKING, find_valid, forget_copy
from checkpointer_lightning.identity import Identity
from checkpointer_lightning.import_lightning import adopt
from checkpointer_lightning.places import name_in

__all__ = ["SHOWN", "Resuming"]

STATE: Final = "checkpointer"
"""Where the manager's state lies in the callback's."""
SHOWN: Final = (
    "best_model_path",
    "best_model_score",
    "best_k_models",
    "kth_best_model_path",
    "kth_value",
    "last_model_path",
    "current_score",
)
"""Names of what `ShownState.show` sets."""


class Resuming(Identity):
    """State, and ``ckpt_path="last"`` and ``"best"``."""

    _saved: Mapping[str, Any] = {}
    """The manager's state as it was last."""
    _goes_on: bool = False
    """Whether `_saved` is what this training goes on from."""
    _theirs: Mapping[str, Any] = {}
    """Path and score of what Lightning's own class had saved, if this training goes on from there."""
    _shown_before: Mapping[str, Any] = {}
    """What was shown before a state was loaded."""
    _found: str | None = None
    """What ``ckpt_path="last"`` was found to mean."""

    def _manager_state(self) -> Mapping[str, Any]:
        raise NotImplementedError

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """See `Callback.setup`: nothing is gone on from yet."""
        super().setup(trainer, pl_module, stage)
        self._goes_on, self._theirs, self._shown_before = False, {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Return what Lightning's callback does, and the manager's state: a resume is then a restore."""
        return {**super().state_dict(), STATE: dict(self._manager_state())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` returned, or what Lightning's callback did."""
        state = dict(state_dict)
        ours = state.pop(STATE, {})
        if not ours:
            super().load_state_dict(state)
            best = state.get("best_model_path")
            newest = {best: None} if best else {}
            self._theirs = dict(self.best_k_models or newest) if self._stage == "fit" else {}
            return
        self.best_model_path = state["best_model_path"]
        if state["dirpath"] == self.dirpath:
            # Until the records are asked, if they are: a validation asks none, nor does a training that has ended.
            self._shown_before = {name: self.__dict__[name] for name in SHOWN if name != "best_model_path"}
            self.__dict__.update({name: state[name] for name in SHOWN})
        self._saved, self._goes_on = ours, self._stage == "fit"

    @property
    def best_model_path(self) -> str:
        """Path or URL of the best checkpoint; empty if none is known.

        A Trainer that is to resolve ``ckpt_path="best"`` gets it from the records, if the callback has saved nothing.
        """
        known: str = self.__dict__["best_model_path"]
        # Before a training is set up, only the object that asks can say which Trainer the callback belongs to.
        connector: Any = None if known else sys._getframe(1).f_locals.get("self")
        if type(connector).__name__ == "_CheckpointConnector":
            known = self.__dict__["best_model_path"] = self._find("best", connector.trainer) or ""
        return known

    @best_model_path.setter
    def best_model_path(self, path: str) -> None:
        self.__dict__["best_model_path"] = path

    def _find_last_checkpoints(self, trainer: Any) -> set[str]:
        """Return what ``ckpt_path="last"`` means here: the newest checkpoint that is whole."""
        self._found = self._find("last", trainer)
        return {self._found} if self._found else super()._find_last_checkpoints(trainer)

    def _find(self, which: Literal["last", "best"], trainer: Any) -> str | None:
        number = self._number(trainer)
        return find_valid(
            which,
            self._resolve_folder(trainer),
            siblings.apart(self._make_policy(), number),
            label=siblings.label(number),
            options={name: value for name, value in self._options.items() if name in LOOKING},
            contents="full" if trainer.state.fn == "fit" else "any",
        )

    def _forget_copies(self, trainer: Any) -> None:
        for path in (self._found, trainer.ckpt_path):
            forget_copy(path)

    def _go_on(self, trainer: Any, manager: CheckpointManager, policy: Policy, *, again: bool) -> None:
        """Let the manager go on with what was restored; ``again``: the same Trainer has fitted before."""
        self._forget_copies(trainer)
        if self._theirs:
            adopt(manager, self._folder, self._theirs, self.monitor)
        state = manager.session.state_dict() if self._theirs else self._saved if self._goes_on or again else None
        if state:
            manager.session.load_state_dict(state, source=self._resumed_name(trainer, policy, manager))

    def _resumed_name(self, trainer: Any, policy: Policy, manager: CheckpointManager) -> str:
        """Return the name of the checkpoint that a person chose to resume from; empty if nobody did."""
        if not (self._goes_on or self._theirs) or trainer.ckpt_path in (None, "", self._found):
            return ""
        template = policy.name.template
        if template is not None and fixed_parts(template, policy.name.join) == template:
            return ""  # The name means the newest, or the best: what it names is replaced, as in Lightning.
        name = name_in(self._folder, trainer.ckpt_path)
        return name if name in manager.session.manifest.by_name and name not in policy.aliases else ""
