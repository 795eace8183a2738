"""The package that a callback belongs to: ``lightning`` or ``pytorch_lightning``, which do not accept each other's."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any, Final

import attrs

__all__ = ["Package"]

_INSTALL: Final = {"lightning": "'torch-checkpointer[lightning]'", "pytorch_lightning": "pytorch-lightning"}
"""What to install for each root."""


@attrs.frozen(kw_only=True)
class Package:
    """What the adapter uses of one package."""

    root: str
    """Import name of the package."""
    trainer: type
    strategy: type
    """Base class of its strategies."""
    torch_io: type
    """Its plugin that writes with ``torch.save``."""
    async_io: type
    """Its plugin that writes in the background."""
    info: Callable[[str], None]
    """Logs on rank 0, as its own callbacks do."""

    @classmethod
    def load(cls, path: str) -> Package:
        """Import the package; ``path`` is the module that has its Trainer."""
        root = path.partition(".")[0]
        try:
            plugins = importlib.import_module(f"{path}.plugins.io")
        except ModuleNotFoundError as error:
            if error.name not in (root, path):
                raise
            msg = (
                f"checkpointer_lightning.for_{root} needs {root}, which is not installed: pip install {_INSTALL[root]}"
            )
            raise ImportError(msg) from error
        return cls(
            root=root,
            trainer=importlib.import_module(path).Trainer,
            strategy=importlib.import_module(f"{path}.strategies").Strategy,
            torch_io=plugins.TorchCheckpointIO,
            async_io=plugins.AsyncCheckpointIO,
            info=importlib.import_module(f"{path}.utilities.rank_zero").rank_zero_info,
        )

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
        if not isinstance(trainer, self.trainer):
            for kind in type(trainer).__mro__:
                self._refuse(kind.__module__.partition(".")[0], name)

    def saves_plainly(self, trainer: Any) -> bool:
        """Return whether ``Trainer.save_checkpoint`` is Lightning's own: a dump that the strategy writes."""
        return _is_plain(trainer, "save_checkpoint", self.trainer)

    def writes_plainly(self, trainer: Any) -> bool:
        """Return whether rank 0 writes the state with ``torch.save``, without a plugin or strategy that differs."""
        plugin = trainer.strategy.checkpoint_io
        if isinstance(plugin, self.async_io):
            plugin = plugin.checkpoint_io  # type: ignore[attr-defined]
        return (
            self.saves_plainly(trainer)
            and _is_plain(trainer.strategy, "save_checkpoint", self.strategy)
            and type(plugin) is self.torch_io
            and _is_plain(plugin, "save_checkpoint", self.torch_io)
        )


def _is_plain(thing: Any, method: str, base: type) -> bool:
    """Return whether a method is the base's: neither overridden, nor replaced on the object by a test or a tool."""
    return method not in vars(thing) and getattr(type(thing), method, None) is getattr(base, method)
