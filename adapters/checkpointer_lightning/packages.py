"""The package that a callback belongs to: ``lightning`` or ``pytorch_lightning``, which do not accept each other's."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import Any, Final

import attrs

_INSTALL: Final = {"lightning": "'torch-checkpointer[lightning]'", "pytorch_lightning": "pytorch-lightning"}
"""What to install for each root."""


@attrs.frozen
class Package:
    """One of the packages, and what its Trainer does itself."""

    pl: Any
    """The module that has its Trainer."""

    @classmethod
    def load(cls, path: str) -> Package:
        """Import the package; ``path`` is the module that has its Trainer."""
        root = path.partition(".")[0]
        try:
            return cls(importlib.import_module(path))
        except ModuleNotFoundError as error:
            if error.name not in (root, path):
                raise
            msg = (
                f"checkpointer_lightning.for_{root} needs {root}, which is not installed: pip install {_INSTALL[root]}"
            )
            raise ImportError(msg) from error

    @property
    def root(self) -> str:
        """Import name of the package."""
        return str(self.pl.__name__.partition(".")[0])

    def log(self, message: str) -> None:
        """Log on rank 0, as its own callbacks do."""
        self.pl.utilities.rank_zero_info(message)

    def _refuse(self, root: str, name: str) -> None:
        if root in _INSTALL and root != self.root:
            msg = (
                f"this {name} is for a Trainer of {self.root}, and was given to one of {root}; "
                f"import it from checkpointer_lightning.for_{root}"
            )
            raise TypeError(msg)

    def refuse_caller(self, name: str) -> None:
        """Raise if the caller of our caller is code of the other package.

        A Trainer first checks the type of each callback. If the type is of the other package, that reads
        ``__class__``. There the right import can be named, before the Trainer fails with an unrelated message.
        """
        self._refuse(str(sys._getframe(2).f_globals.get("__name__", "")).partition(".")[0], name)

    def refuse_trainer(self, trainer: Any, name: str) -> None:
        """Raise if the Trainer is of the other package."""
        if not isinstance(trainer, self.pl.Trainer):
            for kind in type(trainer).__mro__:
                self._refuse(kind.__module__.partition(".")[0], name)

    def saves_plainly(self, trainer: Any) -> bool:
        """Return whether ``Trainer.save_checkpoint`` is Lightning's own: a dump that the strategy writes."""
        return _is_plain(trainer, self.pl.Trainer)

    def writes_plainly(self, trainer: Any) -> bool:
        """Return whether rank 0 writes the state with ``torch.save``, without a plugin or strategy that differs."""
        plugin, torch_io = trainer.strategy.checkpoint_io, self.pl.plugins.TorchCheckpointIO
        if self.is_async(plugin):
            plugin = plugin.checkpoint_io
        return (
            self.saves_plainly(trainer)
            and self.writes_on_rank_zero(trainer)
            and type(plugin) is torch_io
            and _is_plain(plugin, torch_io)
        )

    def writes_on_rank_zero(self, trainer: Any) -> bool:
        """Return whether the strategy lets rank 0 alone write, with its state, whatever plugin it uses."""
        return _is_plain(trainer.strategy, self.pl.strategies.Strategy)

    def is_async(self, plugin: Any) -> bool:
        """Return whether a plugin writes in the background."""
        return isinstance(plugin, self.pl.plugins.AsyncCheckpointIO)

    @contextlib.contextmanager
    def in_foreground(self, strategy: Any) -> Iterator[None]:
        """Let a background plugin write before it returns, because a commit needs the file."""
        plugin = strategy.checkpoint_io
        if not self.is_async(plugin):
            yield
            return
        strategy.checkpoint_io = plugin.checkpoint_io
        try:
            yield
        finally:
            strategy.checkpoint_io = plugin


def _is_plain(thing: Any, base: type) -> bool:
    """Return whether ``save_checkpoint`` is the base's: neither overridden, nor replaced on the object by a tool."""
    name = "save_checkpoint"
    return name not in vars(thing) and getattr(type(thing), name, None) is getattr(base, name)
