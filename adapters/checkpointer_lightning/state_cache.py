"""One dump of the state for all the callbacks of a Trainer that save at the same moment."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any, Final

import attrs

__all__ = ["StateCache", "cache_of"]

_DESKS: Final[weakref.WeakKeyDictionary[Any, StateCache]] = weakref.WeakKeyDictionary()


@attrs.define
class StateCache:
    """Where the callbacks of one Trainer find the dump that another has made at this very moment.

    A dump refers to the tensors of the training, it does not copy them; so it is right until the training goes on,
    and clearing the desk gives nothing back but names.
    """

    _moment: Any = None
    _dumps: dict[bool, dict[str, Any]] = attrs.field(factory=dict)
    """By whether they hold weights alone."""

    def turn_to(self, moment: Any) -> None:
        """Begin a moment: what was dumped at an earlier one is forgotten."""
        if moment != self._moment:
            self._moment = moment
            self._dumps.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.turn_to(None)

    def dump(self, trainer: Any, callbacks: Iterable[Any], *, weights_only: bool) -> dict[str, Any]:
        """Return the state of the Trainer, in a dict that the caller may change.

        A dump is made once; what ``callbacks`` say of themselves in it is as it is now, for one that has saved since
        must not save again after a resume.
        """
        found = self._dumps.get(weights_only)
        if found is not None:
            return _with_states(found, {callback.state_key: callback.state_dict() for callback in callbacks})
        with trainer.profiler.profile("save_checkpoint"):
            made: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(weights_only)
        if self._moment is not None:
            self._dumps[weights_only] = made
        return dict(made)


def _with_states(dump: Mapping[str, Any], states: Mapping[str, Any]) -> dict[str, Any]:
    again = dict(dump)
    if "callbacks" in again:
        again["callbacks"] = {**again["callbacks"], **deepcopy(dict(states))}
    return again


def cache_of(trainer: Any) -> StateCache:
    """Return the desk of a Trainer."""
    return _DESKS.setdefault(trainer, StateCache())
