"""Requests from outside, by a signal or a file: to save, or to stop after a save."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import threading
import time
from collections.abc import Iterable
from types import FrameType
from typing import Any, Final

from checkpointer.commit.index import HOME
from checkpointer.errors import PolicyError
from checkpointer.hosts.grace import Grace
from checkpointer.storage import LocalStorage


def _known(*names: str) -> tuple[signal.Signals, ...]:
    return tuple(getattr(signal, name) for name in names if hasattr(signal, name))


STOP_ON: Final = _known("SIGTERM", "SIGUSR1", "SIGINT")
SAVE_ON: Final = _known("SIGUSR2")
LOOK_EVERY_S: Final = 1.0
"""Seconds between two looks for the file that asks for a save."""
WORKER_WAITS_S: Final = 0.5
"""Seconds that a forked process waits after a signal to see whether the training got it too."""
_STOPPING, _OVER = 0, 1
"""Flags for the forked processes: the training is being stopped; it has ended."""


class StopTraining(BaseException):
    """Ends the loop at a step boundary, after the rescue; the ``with`` block of the `Loop` catches it.

    Like `KeyboardInterrupt` it is not an `Exception`, so that a training's own ``except Exception`` does not catch it.
    """


class Requests:
    """Listens to signals, and looks for the file.

    A signal is delayed, never swallowed: after the answer `checkpointer.hosts.loader_workers.deliver` passes it to the
    handler that had it before. Without a ``file`` that asks for a save it looks for none. A signal to stop begins the
    ``grace``.
    """

    def __init__(self, stop_on: Iterable[int], save_on: Iterable[int], file: str | None, *, grace: Grace) -> None:
        self._stop_on, self._save_on = _as_signals(stop_on, "stop_on"), _as_signals(save_on, "save_on")
        self.signals = (*self._stop_on, *self._save_on)
        """Numbers of all signals that it listens to."""
        self._file, self._grace = file, grace
        self._earlier: dict[int, Any] = {}
        self.stop: int | None = None
        """The signal to stop that has come, if any."""
        self._senders: list[str] = []
        """The senders of requests to save since the last `take`."""
        self.interrupts = 0
        """How often Ctrl-C has come; the second one ends the training at once."""
        self._pid = os.getpid()
        self._shared = mmap.mmap(-1, 2)
        self._to_pass_on: list[int] = []
        self._seen_file: tuple[int, int] | None = None
        self.is_pending = False
        """Whether a signal has come, or the file was found, since the last `take`."""
        self.look_at = 0.0 if file is not None else float("inf")
        """When to `look` for the file again (seconds of the monotonic clock)."""

    # Signals

    def listen(self) -> None:
        """Take the signals over. Only the main thread can, and an ignored signal stays ignored."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in self.signals:
            earlier = signal.getsignal(number)
            if earlier is not None and earlier != signal.SIG_IGN:
                self._earlier[number] = earlier
                signal.signal(number, self._on_signal)

    def restore_handlers(self) -> None:
        """Give the signals back to their earlier handlers."""
        self._shared[_OVER] = 1
        earlier, self._earlier = self._earlier, {}
        for number, handler in earlier.items():
            if signal.getsignal(number) == self._on_signal:  # Else other code has taken it over meanwhile.
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            self._on_signal_in_worker(number)
            return
        if number in self._save_on:
            self._senders.append(signal.Signals(number).name)
            self._to_pass_on.append(number)
        elif self.stop is None:
            self.stop = number
            self._grace.begin()
            self._shared[_STOPPING] = 1
        self.is_pending = True
        self.interrupts += number == signal.SIGINT
        if number == signal.SIGINT and self.interrupts > 1:
            earlier = self._earlier.get(number)
            if not callable(earlier):
                raise KeyboardInterrupt
            earlier(number, frame)

    def _on_signal_in_worker(self, number: int) -> None:
        """Answer in a process that was forked from this one and so has its handlers.

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

    # The file

    def look(self) -> None:
        """Look for the file, and set when to look again."""
        assert self._file is not None, "there is a place for one"
        self.look_at = time.monotonic() + LOOK_EVERY_S
        try:
            stat = os.stat(self._file)
        except OSError:
            self._seen_file = None
            return
        if self._seen_file != (stat.st_ino, stat.st_mtime_ns):
            self._seen_file = (stat.st_ino, stat.st_mtime_ns)
            self._senders.append("the file save-now")
            self.is_pending = True

    # Answers

    def take(self) -> tuple[int | None, str]:
        """Return the signal to stop, and the senders of requests to save since the last call."""
        self.is_pending = False
        senders, self._senders = self._senders, []
        return self.stop, " and ".join(dict.fromkeys(senders))

    def finish_save(self) -> None:
        """Remove the file and call the earlier handlers: the requested save is there, or could not be made."""
        signals, self._to_pass_on = self._to_pass_on, []
        for number in signals:
            earlier = self._earlier.get(number)
            if callable(earlier):
                earlier(number, None)
        if self._file is not None and self._seen_file is not None:
            with contextlib.suppress(OSError):  # A file that cannot be removed is remembered.
                os.remove(self._file)


def _as_signals(numbers: Iterable[int], what: str) -> tuple[signal.Signals, ...]:
    try:
        return tuple(map(signal.Signals, numbers))
    except (TypeError, ValueError):
        msg = f"{what} is {numbers!r}; expected numbers of signals, such as (signal.SIGTERM,)"
        raise PolicyError(msg) from None


def request_file(directory: Any) -> str | None:
    """Return the file that asks for a save; None for a directory that is not on a local disk or a mount."""
    if not isinstance(directory, LocalStorage):
        if not isinstance(directory, (str, os.PathLike)) or "://" in os.fspath(directory):
            return None
        directory = LocalStorage(directory, "")
    return str(directory.local_path(f"{HOME}/save-now"))
