"""Signals that Lightning acts on within their handlers: here a handler only takes a note, and the batch ends first.

SIGTERM with several ranks: whoever gets it takes a note, all agree at the end of a batch, then Lightning stops them.
Its own handler talks to the other ranks from within the handler, which mixes with whatever collective the training is
in, and lets one rank stop at a batch where another goes on.

SLURM's signal before it requeues a job: Lightning saves from within the handler, at whatever instruction the training
is, between two parameters of an optimizer's step for example. Here that runs at the end of the batch, on all ranks.

Either signal to the whole process group reaches the workers of loaders too: see `checkpointer.hosts.loader_workers`.
"""

from __future__ import annotations

import functools
import math
import signal
import sys
import weakref
from collections.abc import Callable
from typing import Any, Final

import attrs
from torch.utils.data import DataLoader, IterableDataset

from checkpointer.hosts.loader_workers import Workers

__all__ = ["Signals", "plan_of", "signals_of"]

_SIGNALS: Final[weakref.WeakKeyDictionary[Any, Signals]] = weakref.WeakKeyDictionary()


@attrs.frozen
class _Swap:
    """One handler in a list of Lightning's that was replaced."""

    handlers: list[Any]
    ours: Callable[..., None]
    theirs: Callable[..., None]

    def undo(self) -> None:
        if self.ours in self.handlers:
            self.handlers[self.handlers.index(self.ours)] = self.theirs


@attrs.define(eq=False)
class Signals:
    """What the processes of one Trainer have been told."""

    noted: bool = False
    """Whether this rank got SIGTERM."""
    agreed: bool = False
    """Whether all ranks know of it, and are at the same step."""
    requeue: bool = False
    """Whether this rank got SLURM's signal, and Lightning has not acted on it yet."""
    requeued: bool = False
    """Whether Lightning has saved what the next run of the job goes on from by itself."""
    _trainer: weakref.ref[Any] | None = None
    _swaps: list[_Swap] = attrs.field(factory=list)
    _hand_on: Callable[[], None] | None = None
    _workers: Workers | None = None

    def cover(self, trainer: Any) -> None:
        """Let the workers of every loader that the Trainer prepares outlive the signals. A second call does nothing."""
        if self._workers is not None:
            return
        trainer = weakref.proxy(trainer)
        asks = _requeue_signal(trainer)
        self._workers = workers = Workers(
            (signal.SIGTERM, *(() if asks is None else (asks,))),
            lambda: bool(trainer.received_sigterm or self.noted or self.requeue),
        )
        workers.listen()
        connector = sys.modules[type(trainer._data_connector).__module__]
        add_seeds = getattr(connector, "_auto_add_worker_init_fn", lambda loader, rank: None)
        process = trainer.strategy.process_dataloader

        def process_and_cover(loader: Any) -> Any:
            loader = process(loader)
            # Lightning does so next, but only for a loader that has no function for its workers yet.
            add_seeds(loader, trainer.global_rank)
            workers.cover(loader)
            return loader

        # No hook runs between the making of a loader and the start of its workers.
        trainer.strategy.process_dataloader = process_and_cover
        connector = trainer._signal_connector
        finish = connector.teardown

        def finish_and_leave() -> None:
            del connector.teardown
            finish()
            self._leave(trainer)

        # No hook runs after Lightning has shut the workers down: until then each worker's end may raise torch's error.
        connector.teardown = finish_and_leave

    def listen(self, trainer: Any, *, talks: bool) -> None:
        """Take a note from now on where Lightning's handlers would act. A second call does nothing.

        Args:
            trainer: Whose handlers they are.
            talks: Whether its handler of SIGTERM would talk to other ranks.
        """
        if self._swaps:
            return
        self.noted = self.agreed = self.requeue = self.requeued = False
        self._trainer = weakref.ref(trainer)
        connector = trainer._signal_connector
        notifier = getattr(connector, "_sigterm_notifier_fn", None)
        first = functools.partial(self._note_first, notifier)
        self._swap(signal.SIGTERM, notifier, self._note if talks else first)
        asks = _requeue_signal(trainer)
        if asks is not None:
            theirs = getattr(connector, "_slurm_sigusr_handler_fn", None)
            if self._swap(asks, theirs, self._note_requeue) and theirs is not None:
                self._hand_on = lambda: theirs(asks, None)

    def _swap(self, signum: int, theirs: Callable[..., None] | None, ours: Callable[..., None]) -> bool:
        handlers = getattr(signal.getsignal(signum), "signal_handlers", None)
        if theirs is None or not isinstance(handlers, list) or theirs not in handlers:
            return False
        handlers[handlers.index(theirs)] = ours
        self._swaps.append(_Swap(handlers, ours, theirs))
        return True

    def _leave(self, trainer: Any) -> None:
        """Give everything back: Lightning's handlers are not in use any more."""
        if self._workers is not None:
            del trainer.strategy.process_dataloader
            self._workers.leave()
            self._workers = None
        for swap in self._swaps:
            swap.undo()
        self._swaps, self._hand_on = [], None

    def stop(self, trainer: Any) -> None:
        """Let every rank raise Lightning's exception at the end of this batch."""
        self.agreed = True
        trainer._signal_connector.received_sigterm = True

    @property
    def awaits_requeue(self) -> bool:
        """Whether SLURM's signal is noted where Lightning would act on it: the same on every rank."""
        return self._hand_on is not None

    def hand_on(self) -> None:
        """Let Lightning act on SLURM's signal, on every rank."""
        self.requeue = False
        if self._hand_on is not None:
            self._hand_on()
            self.requeued = True

    def _note_first(self, theirs: Any, signum: int, frame: Any) -> None:
        # Theirs logs before it sets its flag, and the SIGCHLD of a dead worker may interrupt that.
        self.noted = True
        theirs(signum, frame)

    def _note(self, signum: int, frame: Any) -> None:
        trainer = self._trainer() if self._trainer is not None else None
        launcher = trainer.strategy.launcher if trainer is not None else None
        if launcher is not None and not self.noted:
            launcher.kill(signum)
        self.noted = True

    def _note_requeue(self, signum: int, frame: Any) -> None:
        self.requeue = True


def _requeue_signal(trainer: Any) -> int | None:
    """Return the signal at which Lightning has SLURM run the job again, if it does."""
    environment = trainer._accelerator_connector.cluster_environment
    asks: int | None = getattr(environment, "requeue_signal", None)
    return asks if getattr(environment, "auto_requeue", False) else None


def plan_of(trainer: Any) -> list[int] | None:
    """Return how many batches each loader of the running validation gives; None if that is not certain before."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loaders = loop._combined_loader.flattened if loop._combined_loader is not None else []
    if not all(isinstance(each, DataLoader) and not isinstance(each.dataset, IterableDataset) for each in loaders):
        return None
    return None if any(math.isinf(number) for number in loop.max_batches) else [int(each) for each in loop.max_batches]


def signals_of(trainer: Any) -> Signals:
    """Return what a Trainer's processes have been told."""
    return _SIGNALS.setdefault(trainer, Signals())
