"""Saving through the Trainer: rank 0 decides and commits, every rank writes, nobody waits for what never comes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import attrs

from checkpointer import CheckpointManager, Decision, Save
from checkpointer.errors import SaveError

__all__ = ["Pen", "on_rank_zero"]

T = TypeVar("T")


def on_rank_zero(trainer: Any, act: Callable[[], T]) -> T:
    """Run ``act`` on rank 0 and return its answer on every rank; its error is raised on every rank."""
    answer, error = None, None
    if trainer.is_global_zero:
        try:
            answer = act()
        except Exception as caught:  # The others would wait for ever: they have to hear of it first.
            error = caught
    answer, failure = trainer.strategy.broadcast((answer, f"{error!r}" if error else ""))
    if error is not None:
        raise error
    if failure:
        msg = f"rank 0 failed: {failure}"
        raise SaveError(msg)
    return cast(T, answer)


@attrs.define
class Pen:
    """Lets the Trainer write where rank 0's manager says; ``Trainer.save_checkpoint`` needs every rank."""

    trainer: Any
    weights_only: bool
    async_io: type
    """Writes that return before the file is there are made to wait: a commit needs the file."""
    _told: bool = False

    def __call__(self, path: str) -> None:
        """Write to the staged ``path``: what the manager calls, on rank 0."""
        self._told = True
        self._write(self.trainer.strategy.broadcast(path))

    def commit(self, manager: CheckpointManager | None, decision: Save) -> Decision:
        """Carry out the decision on all ranks; ``manager`` is rank 0's."""

        def act() -> Decision:
            assert manager is not None, "rank 0 has one"
            self._told = False
            try:
                return manager.commit(decision)
            finally:
                if not self._told:  # The manager gave up before it came to write.
                    self.trainer.strategy.broadcast("")

        if not self.trainer.is_global_zero and (path := self.trainer.strategy.broadcast("")):
            self._write(path)
        return on_rank_zero(self.trainer, act)

    def _write(self, path: str) -> None:
        with _in_foreground(self.trainer.strategy, self.async_io):
            self.trainer.save_checkpoint(path, self.weights_only)


@contextlib.contextmanager
def _in_foreground(strategy: Any, async_io: type) -> Iterator[None]:
    plugin = strategy.checkpoint_io
    if not isinstance(plugin, async_io):
        yield
        return
    strategy.checkpoint_io = plugin.checkpoint_io  # type: ignore[attr-defined]
    try:
        yield
    finally:
        strategy.checkpoint_io = plugin
