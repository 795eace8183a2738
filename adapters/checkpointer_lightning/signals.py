"""Signals that Lightning acts on within their handlers: here a handler only sets a flag, and the batch ends first.

SIGTERM with several ranks: the rank that receives it sets a flag, all ranks agree at the end of a batch, then Lightning
stops them. Lightning's own handler communicates within the handler. That mixes with the collective that the training is
in, and one rank may stop at a batch where another goes on.

SLURM's signal before it requeues a job: Lightning saves within the handler, at any instruction of the training, for
example between two parameters of an optimizer's step. Here that runs at the end of the batch, on all ranks.

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

_SIGNALS: Final[weakref.WeakKeyDictionary[Any, Signals]] = weakref.WeakKeyDictionary()


@attrs.define(eq=False)
class Signals:
    """The signals that the processes of one Trainer have received."""

    noted: bool = False
    """Whether this rank got SIGTERM."""
    agreed: bool = False
    """Whether all ranks know of it, and are at the same step."""
    requeue: bool = False
    """Whether this rank got SLURM's signal, and Lightning has not acted on it yet."""
    requeued: bool = False
    """Whether Lightning has saved the file that the next run of the job continues from by itself."""
    _trainer: weakref.ref[Any] | None = None
    """Set while the flags are, in a training."""
    _pass_on: Callable[[], None] | None = None
    _workers: Workers | None = None

    def cover(self, trainer: Any) -> None:
        """Let the workers of every loader that the Trainer prepares survive the signals. A second call does nothing."""
        if self._workers is not None:
            return
        trainer = weakref.proxy(trainer)
        requeue = _requeue_signal(trainer)
        self._workers = workers = Workers(
            (signal.SIGTERM, *(() if requeue is None else (requeue,))),
            lambda: bool(trainer.received_sigterm or self.noted or self.requeue),
        )
        workers.listen()
        module = sys.modules[type(trainer._data_connector).__module__]
        add_seeds = getattr(module, "_auto_add_worker_init_fn", lambda loader, rank: None)
        process = trainer.strategy.process_dataloader

        def process_and_cover(loader: Any) -> Any:
            loader = process(loader)
            # Lightning does so next, but only for a loader that has no function for its workers yet.
            add_seeds(loader, trainer.global_rank)
            workers.cover(loader)
            return loader

        # No hook runs after a loader is made and before its workers start.
        trainer.strategy.process_dataloader = process_and_cover
        connector = trainer._signal_connector
        teardown = connector.teardown

        def teardown_and_leave() -> None:
            del connector.teardown, trainer.strategy.process_dataloader
            teardown()
            workers.leave()
            self._trainer = self._pass_on = self._workers = None

        # No hook runs after Lightning has shut the workers down. Until then each worker's end may raise torch's error.
        connector.teardown = teardown_and_leave

    def listen(self, trainer: Any, *, several_ranks: bool) -> None:
        """Set a flag from now on where Lightning's handlers would act. A second call does nothing."""
        if self._trainer is not None:
            return
        self.noted = self.agreed = self.requeue = self.requeued = False
        self._trainer = weakref.ref(trainer)
        connector = trainer._signal_connector
        notifier = getattr(connector, "_sigterm_notifier_fn", None)
        # Lightning's handler of SIGTERM communicates if there are several ranks.
        _swap(signal.SIGTERM, notifier, self._note if several_ranks else functools.partial(self._first, notifier))
        requeue, theirs = _requeue_signal(trainer), getattr(connector, "_slurm_sigusr_handler_fn", None)
        if requeue is not None and theirs is not None and _swap(requeue, theirs, self._note_requeue):
            self._pass_on = lambda: theirs(requeue, None)

    def stop(self, trainer: Any) -> None:
        """Let every rank raise Lightning's exception at the end of this batch."""
        self.agreed = True
        trainer._signal_connector.received_sigterm = True

    @property
    def awaits_requeue(self) -> bool:
        """Whether SLURM's signal sets a flag where Lightning would act on it: the same on every rank."""
        return self._pass_on is not None

    def pass_on(self) -> None:
        """Let Lightning act on SLURM's signal, on every rank."""
        self.requeue = False
        if self._pass_on is not None:
            self._pass_on()
            self.requeued = True

    def _first(self, theirs: Any, signum: int, frame: Any) -> None:
        # Lightning's logs before it sets its flag, and the SIGCHLD of a dead worker may interrupt that.
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


def _swap(signum: int, theirs: Callable[..., None] | None, ours: Callable[..., None]) -> bool:
    """Replace one handler in Lightning's list, which it drops at its teardown; return whether it was there."""
    handlers = getattr(signal.getsignal(signum), "signal_handlers", None)
    if theirs is None or not isinstance(handlers, list) or theirs not in handlers:
        return False
    handlers[handlers.index(theirs)] = ours
    return True


def _requeue_signal(trainer: Any) -> int | None:
    """Return the signal at which Lightning lets SLURM run the job again; None if it does not."""
    environment = trainer._accelerator_connector.cluster_environment
    signum: int | None = getattr(environment, "requeue_signal", None)
    return signum if getattr(environment, "auto_requeue", False) else None


def batches_per_loader(trainer: Any) -> list[int] | None:
    """Return how many batches each loader of the running validation has; None if that is not known in advance."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loaders = loop._combined_loader.flattened if loop._combined_loader is not None else []
    if not all(isinstance(each, DataLoader) and not isinstance(each.dataset, IterableDataset) for each in loaders):
        return None
    return None if any(math.isinf(number) for number in loop.max_batches) else [int(each) for each in loop.max_batches]


def signals_of(trainer: Any) -> Signals:
    """Return the signals of a Trainer's processes."""
    return _SIGNALS.setdefault(trainer, Signals())
