"""The package that a callback belongs to: ``lightning`` and ``pytorch_lightning`` are twins that do not mix."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Final

import attrs

__all__ = ["Package"]

_ROOTS: Final = ("lightning", "pytorch_lightning")


@attrs.frozen(kw_only=True)
class Package:
    """What an adapter needs of one of the twins."""

    root: str
    """Import name of the package."""
    trainer: type
    """Its Trainer."""
    strategy: type
    """Base of its strategies."""
    torch_io: type
    """Its plugin that writes with ``torch.save``."""
    async_io: type
    """Its plugin that writes in the background."""
    info: Callable[[str], None]
    """Logs on rank 0, as its own callbacks do."""

    def refuse(self, root: str, name: str) -> None:
        """Raise if ``root`` is the other twin: its Trainer would take the callback for a stranger."""
        if root in _ROOTS and root != self.root:
            msg = (
                f"this {name} is for a Trainer of {self.root}, and was given to one of {root}; "
                f"import it from checkpointer_lightning.for_{root}"
            )
            raise TypeError(msg)

    def refuse_caller(self, name: str) -> None:
        """Refuse the other twin's code as the caller of our caller.

        A Trainer first asks whether a callback is one of its own, and that asks a stranger for its ``__class__``: only
        there can the right import be named, before the Trainer fails with a message about something else.
        """
        self.refuse(str(sys._getframe(2).f_globals.get("__name__", "")).partition(".")[0], name)

    def refuse_trainer(self, trainer: Any, name: str) -> None:
        """Refuse the other twin's Trainer."""
        if not isinstance(trainer, self.trainer):
            for kind in type(trainer).__mro__:
                self.refuse(kind.__module__.partition(".")[0], name)

    def saves_plainly(self, trainer: Any) -> bool:
        """Return whether ``Trainer.save_checkpoint`` is Lightning's own: a dump, and the strategy's writing of it."""
        return _is_plain(trainer, "save_checkpoint", self.trainer)

    def writes_plainly(self, trainer: Any) -> bool:
        """Return whether the state is written by rank 0 with ``torch.save``, by nobody's plugin or strategy."""
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
    """Return whether a method is the base's: not overridden, and not put over it by a test or a tool."""
    return method not in vars(thing) and getattr(type(thing), method, None) is getattr(base, method)
