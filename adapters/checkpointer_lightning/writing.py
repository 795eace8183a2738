"""Saving through the Trainer: rank 0 decides and commits, every rank takes part, nobody waits for what never comes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Final

import attrs

from checkpointer import CheckpointManager, Decision
from checkpointer.ports import Ranks
from checkpointer.ranks import on_rank_zero
from checkpointer_lightning.packages import Package

__all__ = ["Pen"]

_NOTHING: Final = ("nothing", "")


@attrs.define
class Pen:
    """Takes the Trainer's state, or lets the Trainer write it, on every rank at once.

    Where writing is Lightning's own ``torch.save``, the state streams through the manager, to wherever its directory
    is. What a plugin or a strategy writes in a way of its own, a folder of shards for example, it writes itself: to
    a staged path, or to a URL that nobody has yet.
    """

    trainer: Any
    package: Package
    ranks: Ranks
    dump: Callable[[], dict[str, Any]]
    """Returns the state, on every rank."""
    weights_only: bool
    _told: bool = False

    @property
    def how(self) -> dict[str, Callable[..., Any]]:
        """Arguments of a manager: how it comes by a checkpoint."""
        return {"state": self.capture} if self.package.writes_plainly(self.trainer) else {"save": self.write}

    def capture(self) -> dict[str, Any]:
        """Return the state: what the manager calls on rank 0."""
        self._tell(("dump", ""))
        return self.dump()

    def write(self, path: str) -> None:
        """Write to ``path``: what the manager calls on rank 0."""
        self._tell(("write", path))
        self._write(path)

    def commit(self, manager: CheckpointManager | None, act: Callable[[CheckpointManager], Decision]) -> Decision:
        """Let rank 0's manager ``act``, and the other ranks take part in what it takes to save."""

        def lead() -> Decision:
            assert manager is not None, "rank 0 has one"
            self._told = False
            try:
                return act(manager)
            finally:
                if not self._told:  # The manager gave up before it came to save, or had nothing to.
                    self._tell(_NOTHING)

        if self.ranks.rank:
            what, path = self.ranks.broadcast(None)
            if what == "dump":
                self.dump()
            elif what == "write":
                self._write(path)
        return on_rank_zero(self.ranks, lead)

    def _tell(self, what: tuple[str, str]) -> None:
        self._told = True
        self.ranks.broadcast(what)

    def _write(self, path: str) -> None:
        with _in_foreground(self.trainer.strategy, self.package.async_io):
            if not self.package.saves_plainly(self.trainer):
                self.trainer.save_checkpoint(path, self.weights_only)
                return
            # What `Trainer.save_checkpoint` does, with a dump that callbacks share.
            state = self.dump()
            with self.trainer.profiler.profile("save_checkpoint"):
                self.trainer.strategy.save_checkpoint(state, path)
                self.trainer.strategy.barrier("Trainer.save_checkpoint")


@contextlib.contextmanager
def _in_foreground(strategy: Any, async_io: type) -> Iterator[None]:
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
