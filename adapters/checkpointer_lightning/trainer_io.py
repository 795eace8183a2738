"""How a Trainer's state is taken and written: rank 0 calls every rank, or rank 0 does it alone."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any, Final

import attrs

from checkpointer.distributed.ranks import Team
from checkpointer.errors import warn
from checkpointer.formats.pickler import refuse_shards_in
from checkpointer.ports import Ranks
from checkpointer.save.background import Busy
from checkpointer_lightning.packages import Package


@attrs.define
class TrainerIO:
    """Takes the Trainer's state, or lets the Trainer write it, on every rank at once.

    If Lightning would write with ``torch.save``, the state streams through the manager, to any kind of directory. A
    plugin or a strategy that writes in its own way, such as a folder of shards, writes itself: to a staged path, or to
    a URL that is not used yet.
    """

    trainer: Any
    package: Package
    ranks: Ranks
    dump: Callable[[], dict[str, Any]]
    """Returns the state, on every rank."""
    weights_only: bool
    is_alone: bool = attrs.field(default=False, init=False)
    """Whether rank 0 must not call the other ranks, because they may be gone."""
    team: Team = attrs.field(init=False)
    _state: dict[str, Any] | None = attrs.field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        self.team = Team(self.ranks, {"take": self._take, "write": self._write})

    def manager_options(self, background: Busy | None) -> dict[str, Any]:
        """Return a manager's arguments: how it gets a checkpoint, and whether the training waits for it."""
        if self.package.writes_plainly(self.trainer):
            if self.package.is_async(self.trainer.strategy.checkpoint_io):
                background = background or "wait"
            return {"state": self.capture, "background": background}
        if background and self.ranks.rank == 0:
            warn(_NO_BACKGROUND)
        return {"save": lambda path: self.team.call("write", path)}

    def capture(self) -> dict[str, Any]:
        """Return the state; the manager calls it on rank 0."""
        if self.is_alone:
            return self.dump()
        self.team.call("take")
        state, self._state = self._state, None
        assert state is not None, "it was taken"
        return state

    def _take(self) -> None:
        state = self.dump()
        self._state = state if self.ranks.rank == 0 else None

    def _write(self, path: str) -> None:
        with self.package.in_foreground(self.trainer.strategy):
            if not self.package.saves_plainly(self.trainer):
                self.trainer.save_checkpoint(path, self.weights_only)
                return
            # As `Trainer.save_checkpoint`, with a dump that callbacks share. Its barrier is left out: if the disk of
            # rank 0 is full, the other ranks would wait there.
            state = self.dump()
            if self.package.writes_on_rank_zero(self.trainer):
                refuse_shards_in(state, "checkpoint")
            with self.trainer.profiler.profile("save_checkpoint"):
                self.trainer.strategy.save_checkpoint(state, path)


_NO_BACKGROUND: Final = (
    "background has no effect here: a plugin, strategy or Trainer that saves in a way of its own reads the live "
    "state, so the training waits for it"
)


@attrs.define
class StateCache:
    """Holds the dump of one callback, so that the other callbacks of the Trainer can use it at the same moment.

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


_CACHES: Final[weakref.WeakKeyDictionary[Any, StateCache]] = weakref.WeakKeyDictionary()
