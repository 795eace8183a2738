"""The answers to signals and requests: a rescue at a boundary, and the end of the training within its grace."""

from __future__ import annotations

import itertools
import logging
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, TypeVar

import attrs

from checkpointer import CheckpointManager, Decision, Skip
from checkpointer.distributed.manager import DistributedManager
from checkpointer.distributed.ranks import Agreement
from checkpointer.errors import warn
from checkpointer.hosts.grace import Grace
from checkpointer.hosts.loader_workers import Workers, deliver
from checkpointer.ports import Ranks
from checkpointer_torch.loader_view import LoaderView
from checkpointer_torch.random_state import put_random_state, take_random_state
from checkpointer_torch.signals import Requests, StopTraining
from checkpointer_torch.training_state import TrainingState

END: Final[Any] = object()
"""Returned by `Interruption.fetch` when a loader has no more batches."""
_log: Final = logging.getLogger("checkpointer.torch")
T = TypeVar("T")


@attrs.define(eq=False)
class Interruption:
    """Answers requests at the boundaries of a training."""

    _saver: CheckpointManager | DistributedManager
    _training: TrainingState
    _ranks: Ranks
    _requests: Requests
    _grace: Grace
    _agree: Agreement = attrs.field(init=False)
    _is_alone: bool = attrs.field(init=False)
    _is_fetching: bool = attrs.field(default=False, init=False)
    workers: Workers = attrs.field(init=False)
    _answered: int | None = attrs.field(default=None, init=False)
    """The signal that ended the training at a boundary."""
    stopped: str = attrs.field(default="", init=False)
    """Why the training was stopped at a boundary; empty if it was not."""

    def __attrs_post_init__(self) -> None:
        self._agree = Agreement(self._ranks)
        self._is_alone = self._ranks.size == 1
        # An error within a fetch changes nothing: the training is at a boundary.
        self.workers = Workers(
            self._requests.signals, lambda: self._requests.stop is not None and not self._is_fetching
        )

    def listen(self) -> None:
        """Take the signals over."""
        self._requests.listen()
        self.workers.listen()

    def attend(self) -> None:
        """Answer what any rank was asked; all ranks call this at the same boundary.

        Raises:
            StopTraining: If a signal asked for the end.
        """
        if time.monotonic() >= self._requests.look_at:
            self._requests.look()
        if self._agree(self._requests.is_pending):
            self._answer()

    def attend_alone(self) -> None:
        """Answer at a boundary that other ranks may not be at."""
        if self._is_alone and self._requests.is_pending and not self._training.position.is_within_step:
            self.attend()

    def may_save(self) -> bool:
        """Return whether a save may begin; False after a signal if the save before it does not end within the grace."""
        left = self._grace.left if self._is_alone else None
        return left is None or self._saver.wait(left)

    def fetch(self, batches: Iterator[T], attend: Callable[[], object]) -> T:
        """Return the next batch, or `END`; call ``attend`` first if the loader fails."""
        self._is_fetching = self._is_alone
        try:
            return next(batches, END)
        except Exception:
            # The signal may have ended the loader's workers; other ranks are not at this place.
            if self._is_alone:
                attend()
            raise
        finally:
            self._is_fetching = False

    def validated(self, loader: Iterable[T], limit: int | None) -> Iterator[T]:
        """Yield the batches of a validation, and answer a signal to stop after any of them.

        The rescue has the states of the random generators and of the loader that the validation began with.
        """
        view, agreement = LoaderView(loader), Agreement(self._ranks)
        random, own = take_random_state(), view.take()

        def attend(*, is_done: bool = False) -> bool:
            stops = self._requests.stop is not None and not self._training.position.is_within_step
            if not agreement(stops or is_done):
                return False
            ranks = self._ranks.gather((stops, is_done))
            if any(stops for stops, _ in ranks):
                put_random_state(random)
                view.put(own)
                self._answer()
            return all(is_done for _, is_done in ranks)

        batches = itertools.islice(loader, limit)
        while (batch := self.fetch(batches, attend)) is not END:
            yield batch
            attend()
        while not attend(is_done=True):
            pass  # Another rank has more batches, and all have to stop at the same place.

    def _answer(self) -> None:
        """Do what is asked on any rank; all ranks are here."""
        asked = self._ranks.gather(self._requests.take())
        for stop, _ in asked:
            if stop is not None:
                self._stop(stop)
        if senders := next((senders for _, senders in asked if senders), ""):
            self._rescue(f"asked for by {senders}")
            self._requests.finish_save()

    def _stop(self, number: int) -> None:
        self._grace.begin()  # Clocks of other hosts differ: a rank that got no signal itself counts from now.
        left, took = self._grace.left, self._training.took_s
        if took is not None and left is not None and left < took and self._ranks.rank == 0:
            msg = (
                f"{left:.1f} s are left of the grace of {self._grace.seconds:g} s, and the last save took "
                f"{took:.1f} s: the rescue may be cut off, and then the run goes on from the checkpoint before it"
            )
            warn(msg)
        name = signal.Signals(number).name
        saved = self._rescue(name)
        self._answered = number
        self.stopped = f"{name} at step {self._training.position.step}; {saved}"
        _log.warning("stopped by %s", self.stopped)
        raise StopTraining(self.stopped)

    def _rescue(self, reason: str) -> str:
        try:
            decision: Decision = self._saver.rescue(reason, timeout=self._grace.left)
        except Exception as error:  # Older checkpoints are untouched, and the signal still has to be answered.
            msg = f"the save asked for by {reason} failed ({error!r}); older checkpoints are untouched"
            warn(msg)
            return msg
        what = decision.reason if isinstance(decision, Skip) else f"saved as {decision.name}"
        _log.info("%s: %s", reason, what)
        return what

    # The end

    def finish(self, error: BaseException | None, save: Callable[[], object]) -> None:
        """Close the saver, after ``save`` or, if an error or a late signal ends the training, after a rescue."""
        is_answered = isinstance(error, StopTraining) or self._is_immediate(error)
        try:
            if error is None:
                save()
            late, is_within = self._requests.stop, self._training.position.is_within_step
            is_open = self._answered is None and self._is_alone and not is_within
            if late is not None and is_open and (error is None or is_answered):
                self._rescue(signal.Signals(late).name)
        except BaseException:
            self._saver.close(timeout=self._grace.left)
            raise
        self._saver.close(None if is_answered else error, timeout=self._grace.left)

    def leave(self) -> None:
        """Give the signals back to their earlier handlers."""
        self._requests.restore_handlers()
        self.workers.leave()

    def deliver(self, error: BaseException | None) -> bool:
        """Pass a signal that has come on to its earlier handler, and return whether the error was the answer to it."""
        is_stop = isinstance(error, StopTraining)
        number = self._answered if is_stop else self._requests.stop
        if number is not None and not self._is_immediate(error):
            if error is not None and not is_stop:
                # By default the process ends in `deliver`, and the error would not be shown.
                name = signal.Signals(number).name
                _log.error("%s had come, and then the training failed", name, exc_info=error)
            try:
                deliver(number)
            except KeyboardInterrupt as interrupt:
                # The log says at which step the training stopped. Where in the loop is not of interest.
                raise interrupt from None
        return is_stop

    def _is_immediate(self, error: BaseException | None) -> bool:
        return isinstance(error, KeyboardInterrupt) and self._requests.interrupts > 1
