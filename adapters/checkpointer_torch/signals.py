"""What is asked from outside, by a signal or a file: to save, or to stop after a save."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, Final

import attrs

from checkpointer.errors import PolicyError

__all__ = ["SAVE_ON", "STOP_ON", "Asked", "Requests", "StopTraining"]


def _known(*names: str) -> tuple[signal.Signals, ...]:
    return tuple(getattr(signal, name) for name in names if hasattr(signal, name))


def _as_signals(numbers: Iterable[int], what: str) -> tuple[signal.Signals, ...]:
    try:
        return tuple(map(signal.Signals, numbers))
    except (TypeError, ValueError):
        msg = f"{what} is {numbers!r}; expected numbers of signals, such as (signal.SIGTERM,)"
        raise PolicyError(msg) from None


STOP_ON: Final = _known("SIGTERM", "SIGUSR1", "SIGINT")
SAVE_ON: Final = _known("SIGUSR2")
LOOK_EVERY_S: Final = 1.0
"""The file that asks for a save is looked for no more often than this (seconds)."""
WORKER_WAITS_S: Final = 0.5
"""A forked process that gets a signal waits so long (seconds) to see whether the training got it too."""
_STOPPING, _OVER = 0, 1
"""What the forked processes see: that the training is being stopped, and that it has ended."""


class StopTraining(BaseException):
    """Ends the loop at a step boundary, after the rescue; the ``with`` block of the `Loop` catches it.

    Like `KeyboardInterrupt` no `Exception`, so that a training's own ``except Exception`` does not hold it.
    """


@attrs.frozen(kw_only=True)
class Asked:
    """What was asked since the loop last looked."""

    stop: int | None = None
    """The signal that asks to stop."""
    save: str = ""
    """Who asks for a save; empty if nobody does."""


class Requests:
    """Listens to signals, and looks for the file.

    A signal is delayed, never swallowed: once it is answered, `checkpointer.hosts.loader_workers.deliver` hands it to
    the handler that had it before.

    Args:
        stop_on: Signals that end the training.
        save_on: Signals that ask for a save.
        file: The file that asks for a save; None if nobody can put one where the checkpoints are.
        clock: Seconds.
    """

    def __init__(
        self,
        stop_on: Iterable[int],
        save_on: Iterable[int],
        file: str | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stop_on, self._save_on = _as_signals(stop_on, "stop_on"), _as_signals(save_on, "save_on")
        self.signals = (*self._stop_on, *self._save_on)
        """Numbers of all that it listens to."""
        self._file = file
        self._clock = clock
        self._earlier: dict[int, Any] = {}
        self._stop: int | None = None
        self._saving: int | None = None
        self.since: float | None = None
        """When the stop was asked for here (seconds of the clock)."""
        self._interrupts = 0
        self._pid = os.getpid()
        self._shared = mmap.mmap(-1, 2)
        self._to_pass_on: list[int] = []
        self._seen_file: tuple[int, int] | None = None
        self._file_asks = False
        self.some = False
        """Whether a signal has come, or the file was found."""
        self.look_at = 0.0 if file is not None else float("inf")
        """When to `look` for the file again (seconds of the clock)."""
        self.was_immediate = False
        """Whether a second Ctrl-C would not wait."""

    # Signals

    def listen(self) -> None:
        """Take the signals over. Only the main thread can, and what is ignored stays so."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in self.signals:
            earlier = signal.getsignal(number)
            if earlier is not None and earlier != signal.SIG_IGN:
                self._earlier[number] = earlier
                signal.signal(number, self._on_signal)

    def give_back(self) -> None:
        """Let the signals go where they went before."""
        self._shared[_OVER] = 1
        earlier, self._earlier = self._earlier, {}
        for number, handler in earlier.items():
            if signal.getsignal(number) == self._on_signal:  # Else somebody has taken it over from us.
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            self._in_worker(number)
            return
        if number in self._save_on:
            self._saving = number
            self._to_pass_on.append(number)
        elif self._stop is None:
            self._stop, self.since = number, self._clock()
            self._shared[_STOPPING] = 1
        self.some = True
        self._interrupts += number == signal.SIGINT
        if number == signal.SIGINT and self._interrupts > 1:
            self.was_immediate = True
            self._call_earlier(number, frame)

    def _in_worker(self, number: int) -> None:
        """Answer in a process that was forked from ours and so has our handlers.

        A signal to the whole group stops the training, and the process goes on up to the boundary. A signal to this
        process alone does what it does by default. Workers of a loader have handlers of their own: see
        `checkpointer.hosts.loader_workers`.
        """
        if number in self._save_on:
            return
        give_up = time.monotonic() + WORKER_WAITS_S
        while not self._shared[_STOPPING] and not self._shared[_OVER] and time.monotonic() < give_up:
            time.sleep(0.01)
        if self._shared[_OVER] or not self._shared[_STOPPING]:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            signal.raise_signal(number)

    def _call_earlier(self, number: int, frame: FrameType | None) -> None:
        earlier = self._earlier.get(number)
        if callable(earlier):
            earlier(number, frame)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    # The file

    def look(self) -> None:
        """Look for the file, and remember when to look again."""
        assert self._file is not None, "there is a place for one"
        self.look_at = self._clock() + LOOK_EVERY_S
        try:
            stat = os.stat(self._file)
        except OSError:
            self._seen_file = None
            return
        if self._seen_file != (stat.st_ino, stat.st_mtime_ns):
            self._seen_file = (stat.st_ino, stat.st_mtime_ns)
            self._file_asks = self.some = True

    # Answers

    def take(self) -> Asked:
        """Return what was asked; it counts as heard."""
        saving, by = self._saving, self._file_asks
        asks = ([signal.Signals(saving).name] if saving is not None else []) + (["the file save-now"] if by else [])
        self._saving, self._file_asks, self.some = None, False, False
        return Asked(stop=self._stop, save=" and ".join(asks))

    def answered(self) -> None:
        """The save that was asked for is there, or could not be made: the file goes, an earlier handler is called."""
        signals, self._to_pass_on = self._to_pass_on, []
        for number in signals:
            earlier = self._earlier.get(number)
            if callable(earlier):
                earlier(number, None)
        if self._file is not None and self._seen_file is not None:
            with contextlib.suppress(OSError):  # One that cannot be removed is remembered.
                os.remove(self._file)

    @property
    def unanswered(self) -> int | None:
        """The signal to stop that has come, if any."""
        return self._stop
