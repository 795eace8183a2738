"""SIGTERM with several ranks: whoever gets it takes a note, all agree at the end of a batch, then Lightning stops them.

Lightning's own handler talks to the other ranks from within the handler, which mixes with whatever collective the
training is in, and lets one rank stop at a batch where another goes on. Here it only takes a note.
"""

from __future__ import annotations

import signal
import weakref
from typing import Any, Final

import attrs

__all__ = ["Signals", "signals_of"]

_SIGNALS: Final[weakref.WeakKeyDictionary[Any, Signals]] = weakref.WeakKeyDictionary()


@attrs.define
class Signals:
    """What the processes of one Trainer have been told."""

    noted: bool = False
    """Whether this rank got the signal."""
    agreed: bool = False
    """Whether all ranks know of it, and are at the same step."""
    _trainer: weakref.ref[Any] | None = None
    _theirs: Any = None
    _handlers: list[Any] | None = None

    def listen(self, trainer: Any) -> None:
        """Take a note from now on where Lightning's handler would talk. A second call does nothing."""
        handlers = getattr(signal.getsignal(signal.SIGTERM), "signal_handlers", None)
        theirs = getattr(trainer._signal_connector, "_sigterm_notifier_fn", None)
        if isinstance(handlers, list) and theirs in handlers:
            handlers[handlers.index(theirs)] = self._note
            self._trainer, self._theirs, self._handlers = weakref.ref(trainer), theirs, handlers
            self.noted = self.agreed = False

    def leave(self) -> None:
        """Let Lightning's handler be again."""
        if self._handlers is not None and self._note in self._handlers:
            self._handlers[self._handlers.index(self._note)] = self._theirs
        self._theirs = self._handlers = None

    def stop(self, trainer: Any) -> None:
        """Let every rank raise Lightning's exception at the end of this batch."""
        self.agreed = True
        trainer._signal_connector.received_sigterm = True

    def _note(self, signum: int, frame: Any) -> None:
        trainer = self._trainer() if self._trainer is not None else None
        launcher = trainer.strategy.launcher if trainer is not None else None
        if launcher is not None and not self.noted:
            launcher.kill(signum)
        self.noted = True


def signals_of(trainer: Any) -> Signals:
    """Return what a Trainer's processes have been told."""
    return _SIGNALS.setdefault(trainer, Signals())
