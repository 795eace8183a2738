"""One dump of the state for all the callbacks of a Trainer that save at the same moment."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from copy import deepcopy
from typing import Any, Final

import attrs

__all__ = ["StateCache", "cache_of"]

_CACHES: Final[weakref.WeakKeyDictionary[Any, StateCache]] = weakref.WeakKeyDictionary()


@attrs.define
class StateCache:
    """Holds the dump that one callback of a Trainer has made, for the other callbacks at the same moment.

    A dump refers to the tensors of the training and does not copy them. So it is valid until the training continues,
    and clearing it frees no tensor.
    """

    _moment: Any = None
    _dumps: dict[bool, dict[str, Any]] = attrs.field(factory=dict)
    """The key is whether the dump has weights only."""

    def begin(self, moment: Any) -> None:
        """Begin a moment, and clear the dumps if they are of an earlier one; None only clears."""
        if moment != self._moment:
            self._moment = moment
            self._dumps.clear()

    def dump(self, trainer: Any, callbacks: Iterable[Any], *, weights_only: bool) -> dict[str, Any]:
        """Return the state of the Trainer, in a dict that the caller may change.

        A dump is made once. Only the states of ``callbacks`` in it are taken again, because a callback that has saved
        since must not save again after a resume.
        """
        found = self._dumps.get(weights_only)
        if found is None:
            with trainer.profiler.profile("save_checkpoint"):
                found = trainer._checkpoint_connector.dump_checkpoint(weights_only)
            if self._moment is not None:
                self._dumps[weights_only] = found
            return dict(found)
        if "callbacks" not in found:
            return dict(found)
        states = {callback.state_key: deepcopy(callback.state_dict()) for callback in callbacks}
        return {**found, "callbacks": {**found["callbacks"], **states}}


def cache_of(trainer: Any) -> StateCache:
    """Return the cache of a Trainer."""
    return _CACHES.setdefault(trainer, StateCache())
