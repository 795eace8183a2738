"""A DataLoader's worker processes, when a signal to stop comes to the whole process group."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from multiprocessing import resource_tracker
from multiprocessing.sharedctypes import RawArray
from types import FrameType, MethodType
from typing import Any, Final

import attrs

WAIT_S: Final = 0.5
"""Seconds that the death of a worker waits for the signal that may have caused it."""


class Workers:
    """Lets the workers of a training go on when a signal comes to the whole group, until the training has stopped.

    Left alone, a worker dies: torch sets C handlers in each worker, which end it when another process than its parent
    sends SIGTERM. Then torch's handler of SIGCHLD raises a `RuntimeError` in the training, at any line of it: within
    the optimizer's step, or within the save that the signal asked for.

    So the workers of a `cover`-ed loader ignore the signals while the training goes on. A worker starts with the
    signals blocked, because it can ignore them only once it runs Python code of the loader. Two kinds of worker may
    still die: those of a loader that was not covered, and one that is starting from a forkserver that ran before. While
    the training is being stopped, that is an error of the next batch only.

    Args:
        signals: Numbers of the signals that the training answers.
        is_stopping: Returns whether such a signal has come, and the loss of a worker must not disturb.
    """

    def __init__(self, signals: Iterable[int], is_stopping: Callable[[], bool]) -> None:
        self._signals = tuple(signals)
        self._is_stopping = is_stopping
        self._over = RawArray("b", 1)
        self._pid = os.getpid()
        self._covered: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._earlier: Any = None

    def listen(self) -> None:
        """Take SIGCHLD over, if this is the main thread. A second call does nothing."""
        if self._earlier is not None or threading.current_thread() is not threading.main_thread():
            return
        # With the first worker torch would put its handler around ours, and raise before ours is called.
        with contextlib.suppress(ImportError, AttributeError):
            from torch.utils.data._utils import signal_handling

            signal_handling._set_SIGCHLD_handler()
        earlier = signal.getsignal(signal.SIGCHLD)
        while isinstance(over := getattr(earlier, "__self__", None), Workers) and over._over[0]:
            earlier = over._earlier  # A Trainer puts back the handlers that it found: ours, though we have left.
        if callable(earlier):
            self._earlier = earlier
            signal.signal(signal.SIGCHLD, self._on_child)

    def cover(self, loader: Any) -> None:
        """Let the workers that a loader starts from now on ignore the signals, whatever starts them.

        Args:
            loader: A ``DataLoader``, also one that accelerate has wrapped. Anything else is left alone.
        """
        each: Any
        for each in (loader, getattr(loader, "base_dataloader", None)):
            has_workers = getattr(each, "num_workers", 0) and hasattr(each, "worker_init_fn")
            if has_workers and not isinstance(each.worker_init_fn, _Covered):
                each.worker_init_fn = _Covered(self._signals, self._over, each.worker_init_fn)
                self._covered[id(each)] = each
                if hasattr(each, "_get_iterator"):
                    each._get_iterator = MethodType(_get_iterator, each)

    def leave(self) -> None:
        """The training is over: signals end the workers again, and SIGCHLD goes where it went before."""
        self._over[0] = 1
        for loader in list(self._covered.values()):
            if isinstance(loader.worker_init_fn, _Covered):
                loader.worker_init_fn = loader.worker_init_fn.then
                vars(loader).pop("_get_iterator", None)
        self._forget_losses()
        if self._earlier is not None and signal.getsignal(signal.SIGCHLD) == self._on_child:
            signal.signal(signal.SIGCHLD, self._earlier)

    def _on_child(self, number: int, frame: FrameType | None) -> None:
        try:
            self._earlier(number, frame)
        except RuntimeError:
            if self._over[0] or os.getpid() != self._pid or not self._stops_soon():
                raise

    def _forget_losses(self) -> None:
        """Let torch report each loader's loss here: it would raise when any other child of this process ends."""
        with contextlib.suppress(ImportError):
            from torch.utils.data._utils import signal_handling

            check = getattr(signal_handling, "_error_if_any_worker_fails", lambda: None)
            lost = True
            while lost:
                try:
                    check()
                    lost = False
                except RuntimeError:
                    pass  # Once it has raised for a loader, it forgets that loader's workers.

    def _stops_soon(self) -> bool:
        """Return whether the signal has come: some senders go from process to process, and a worker may be first."""
        give_up = time.monotonic() + WAIT_S
        while not self._is_stopping() and time.monotonic() < give_up:
            time.sleep(0.01)  # The handler of the other signal runs meanwhile.
        return self._is_stopping()


def _get_iterator(loader: Any) -> Any:
    """Take the place of a loader's ``_get_iterator``, which starts the workers: they inherit the blocked signals."""
    if (loader.multiprocessing_context or multiprocessing).get_start_method() != "fork":
        resource_tracker.ensure_running()  # Python unblocks SIGTERM here when it starts the tracker.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, loader.worker_init_fn.signals)
    try:
        return type(loader)._get_iterator(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@attrs.frozen(eq=False)
class _Covered:
    """A loader's ``worker_init_fn``: runs in the worker, after torch has set its handlers there."""

    signals: tuple[int, ...]
    over: Any
    """One byte that all processes share: whether the training is over."""
    then: Callable[[int], None] | None
    """The loader's own."""

    def __call__(self, worker: int) -> None:
        for number in self.signals:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.signals)
        if self.then is not None:
            self.then(worker)

    def __deepcopy__(self, memo: Any) -> _Covered:
        return self  # The byte cannot be copied.

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        parent = multiprocessing.parent_process()
        if self.over[0] or parent is None or not parent.is_alive():
            os._exit(0)  # As torch's own handler does, or its SIGCHLD handler raises while the parent exits.


def deliver(number: int) -> None:
    """Raise a signal that was delayed: by default it ends the process, with the status that says so."""
    if signal.getsignal(number) == signal.SIG_DFL:
        # Python ends its daemons when it exits. The default action does not, and a loader's workers would go on for
        # seconds, until they see that their parent is gone.
        for child in multiprocessing.active_children():
            if child.daemon:
                child.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    signal.raise_signal(number)
