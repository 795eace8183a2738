"""Saving through the Trainer: rank 0 decides and commits, every rank takes part, nobody waits for what never comes."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Final

import attrs

from checkpointer import CheckpointerWarning
from checkpointer.distributed.ranks import Team
from checkpointer.ports import Ranks
from checkpointer.save.background import Busy
from checkpointer_lightning.packages import Package

__all__ = ["TrainerIO", "in_foreground"]


@attrs.define
class TrainerIO:
    """Takes the Trainer's state, or lets the Trainer write it, on every rank at once.

    Where writing is Lightning's own ``torch.save``, the state streams through the manager, to wherever its directory
    is. What a plugin or a strategy writes in a way of its own, a folder of shards for example, it writes itself: to
    a staged path, or to a URL that nobody has yet.
    """

    trainer: Any
    package: Package
    dump: Callable[[], dict[str, Any]]
    """Returns the state, on every rank."""
    weights_only: bool
    team: Team
    is_alone: bool = False
    """Whether the other ranks are not to be called: they may be gone."""
    _state: dict[str, Any] | None = None

    @classmethod
    def of(
        cls, trainer: Any, package: Package, ranks: Ranks, dump: Callable[[], dict[str, Any]], *, weights_only: bool
    ) -> TrainerIO:
        """Return the pen of a Trainer's ranks."""
        acts: dict[str, Callable[..., None]] = {}
        pen = cls(trainer, package, dump, weights_only, Team(ranks, acts))
        acts.update(take=pen._take, write=pen._write)
        return pen

    def how(self, *, background: Busy | None) -> dict[str, Any]:
        """Return a manager's arguments: how it comes by a checkpoint, and whether the training waits for it.

        Args:
            background: As for `CheckpointManager`. Lightning's plugin asks for ``"wait"`` too.
        """
        if self.package.writes_plainly(self.trainer):
            if isinstance(self.trainer.strategy.checkpoint_io, self.package.async_io):
                background = background or "wait"
            return {"state": self.capture, "background": background}
        if background and self.team.ranks.rank == 0:
            warnings.warn(_NO_BACKGROUND, CheckpointerWarning, stacklevel=2)
        return {"save": self.write}

    def capture(self) -> dict[str, Any]:
        """Return the state: what the manager calls on rank 0."""
        if self.is_alone:
            return self.dump()
        self.team.call("take")
        state, self._state = self._state, None
        assert state is not None, "it was taken"
        return state

    def write(self, path: str) -> None:
        """Write to ``path``: what the manager calls on rank 0."""
        self.team.call("write", path)

    def _take(self) -> None:
        state = self.dump()
        self._state = state if self.team.ranks.rank == 0 else None

    def _write(self, path: str) -> None:
        with in_foreground(self.trainer.strategy, self.package.async_io):
            if not self.package.saves_plainly(self.trainer):
                self.trainer.save_checkpoint(path, self.weights_only)
                return
            # What `Trainer.save_checkpoint` does, with a dump that callbacks share; and without its barrier, at which
            # the others would wait for a rank 0 that has met a full disk.
            state = self.dump()
            with self.trainer.profiler.profile("save_checkpoint"):
                self.trainer.strategy.save_checkpoint(state, path)


_NO_BACKGROUND: Final = (
    "background has no effect here: a plugin, strategy or Trainer that saves in a way of its own reads the live "
    "state, so the training waits for it"
)


@contextlib.contextmanager
def in_foreground(strategy: Any, async_io: type) -> Iterator[None]:
    """Make a plugin wait that returns before the file is there: a commit needs the file."""
    plugin = strategy.checkpoint_io
    if not isinstance(plugin, async_io):
        yield
        return
    strategy.checkpoint_io = plugin.checkpoint_io  # type: ignore[attr-defined]
    try:
        yield
    finally:
        strategy.checkpoint_io = plugin
