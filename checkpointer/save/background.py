"""One writer thread behind the manager: it carries decisions out in order, while the loop goes on."""

from __future__ import annotations

import concurrent.futures.thread as _executors  # Its exit hook must be older than ours, and so run after it.
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Literal, Protocol

import attrs

from checkpointer.errors import PolicyError, SaveError
from checkpointer.policy.decide import Attach, Save, after
from checkpointer.policy.policy import Policy
from checkpointer.records.manifest import Manifest

__all__ = ["Background", "BackgroundStatus", "Busy", "Job", "Outcome", "as_busy", "copies_of", "finish_at_exit"]

Busy = Literal["wait", "skip"]
"""What a save does that is due while another is still running."""

POLL_S: Final = 1.0
"""Seconds after which a waiting thread looks whether the writer still lives."""

_log = logging.getLogger("checkpointer")


@attrs.frozen(kw_only=True)
class BackgroundStatus:
    """What the writer thread has to do, and what it cost the loop so far."""

    unfinished: tuple[str, ...] = ()
    """Names of the checkpoints that are being written or wait for it, oldest first."""
    num_waits: int = 0
    """How many times the loop waited because a save was due while another was running."""
    waited_s: float = 0.0
    """Seconds it waited in all."""
    num_skipped: int = 0
    """How many saves made way for a newer one before they were begun (``background="skip"``)."""


@attrs.define
class Job:
    """One decision on its way."""

    decision: Save | Attach
    work: Callable[[Job], None]
    """Carries it out; called with the job, on the writer thread."""
    drop: Callable[[], None]
    """Gives up what the work would need; called if it is not begun."""
    is_saved: bool = False
    """Whether the checkpoint counts: set by the work, as soon as it is committed."""


@attrs.frozen
class Outcome:
    """How a job ended."""

    decision: Save | Attach
    is_saved: bool
    error: BaseException | None = None


def as_busy(background: object) -> Busy | None:
    """Return what ``background=`` stands for, None for writing in the loop."""
    if background is None or background == "wait" or background == "skip":
        return background
    msg = f"background is {background!r}; expected 'wait', 'skip' or None"
    raise PolicyError(msg)


def copies_of(busy: Busy) -> int:
    """Return how many copies of a state there are at a time: the one that is being written, and one that waits."""
    return 1 if busy == "wait" else 2


class Background:
    """Does jobs in order on a thread that lives as long as there are any.

    Args:
        busy: ``"wait"``: a save waits until the one before is done; ``"skip"``: it takes the place of one that has not
            begun.
        manifest: Returns the manifest as the jobs have left it.
        on_failure: Called on the writer thread after a job has failed, when `hear` has it to tell.
    """

    def __init__(self, busy: Busy, manifest: Callable[[], Manifest], on_failure: Callable[[], None]) -> None:
        self._busy = busy
        self._manifest = manifest
        self._on_failure = on_failure
        self._num_waits = 0
        self._waited_s = 0.0
        self._num_skipped = 0
        self._start_over()
        finish_at_exit(self)

    def _start_over(self) -> None:
        """Begin with nothing to do, as in a forked child: the jobs are its parent's, and so is the thread."""
        self._pid = os.getpid()
        self._news = threading.Condition()
        # The first is being done; the others have not begun.
        self._jobs: deque[Job] = deque()
        self._outcomes: deque[Outcome] = deque()
        self._before = Manifest()
        self._thread: threading.Thread | None = None

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            self._start_over()

    # For the loop

    @property
    def is_here(self) -> bool:
        """Whether the caller is the writer thread itself, as a listener is."""
        self._check_process()
        return threading.current_thread() is self._thread

    @property
    def status(self) -> BackgroundStatus:
        """What there is to do, without waiting for it."""
        self._check_process()
        with self._news:
            names = tuple(job.decision.name for job in self._jobs if isinstance(job.decision, Save))
        return BackgroundStatus(
            unfinished=names, num_waits=self._num_waits, waited_s=self._waited_s, num_skipped=self._num_skipped
        )

    def outlook(self, policy: Policy) -> Manifest:
        """Return the manifest as it will be once every job is done."""
        self._check_process()
        with self._news:
            if not self._jobs:
                return self._manifest()
            manifest = self._before
            for job in self._jobs:
                manifest = after(job.decision, manifest, policy)
            return manifest

    def make_room(self, step: int) -> list[int]:
        """Wait until another save may be taken, or drop one that has not begun; return the steps that were dropped."""
        self._check_process()
        if self._busy == "skip":
            return self._drop_waiting(step)
        started = time.monotonic()
        with self._news:
            running = [job.decision.name for job in self._jobs if isinstance(job.decision, Save)]
            while any(isinstance(job.decision, Save) for job in self._jobs):
                self._wait_a_little(None)
        if running:
            waited = time.monotonic() - started
            self._num_waits += 1
            self._waited_s += waited
            level = logging.WARNING if self._num_waits == 1 else logging.INFO
            _log.log(level, "step %d: waited %.3g s for %s to be written", step, waited, running[0])
        return []

    def _drop_waiting(self, step: int) -> list[int]:
        with self._news:
            waiting = [job for job in list(self._jobs)[1:] if isinstance(job.decision, Save)]
            steps = {job.decision.observation.step for job in waiting}
            # Metrics of a step that is not saved have nowhere to go.
            dropped = [job for job in list(self._jobs)[1:] if job.decision.observation.step in steps]
            for job in dropped:
                self._jobs.remove(job)
            self._num_skipped += len(waiting)
            self._news.notify_all()
        for job in dropped:
            job.drop()
        for job in waiting:
            _log.warning("%s is not saved: it waited for its turn until step %d was due", job.decision.name, step)
        return sorted(steps)

    def submit(self, job: Job) -> None:
        """Have a job done. Returns at once.

        Raises:
            RuntimeError: If no thread can be started.
        """
        self._check_process()
        with self._news:
            if not self._jobs:
                self._before = self._manifest()
            self._jobs.append(job)
            if self._thread is None or not self._thread.is_alive():
                # Not a daemon: the interpreter waits for it.
                self._thread = threading.Thread(target=self._run, name="checkpointer-writer", daemon=False)
                try:
                    self._thread.start()
                except RuntimeError:
                    self._thread = None
                    self._jobs.remove(job)
                    raise

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until every job is done, at most so many seconds; return whether all are. On the thread: at once."""
        if self.is_here:
            return True
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._news:
            while self._jobs:
                if deadline is not None and time.monotonic() >= deadline:
                    return False
                self._wait_a_little(deadline)
        return True

    def finish(self) -> None:
        """Wait until every job is done, at the end of the program."""
        self.wait()

    def _wait_a_little(self, deadline: float | None) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._lose()
            return
        left = POLL_S if deadline is None else min(POLL_S, max(0.0, deadline - time.monotonic()))
        self._news.wait(left)

    def _lose(self) -> None:
        """Say of each job that it will not be done."""
        while self._jobs:
            job = self._jobs.popleft()
            error = SaveError(f"the writer thread is gone, and {job.decision.name} with it")
            _log.error("%s", error)
            self._outcomes.append(Outcome(job.decision, job.is_saved, error))
            job.drop()

    def hear(self) -> Outcome | None:
        """Return how the next job ended that nobody has heard of; None if there is none."""
        self._check_process()
        with self._news:
            if self._jobs and (self._thread is None or not self._thread.is_alive()):
                self._lose()
            return self._outcomes.popleft() if self._outcomes else None

    # On the thread

    def _run(self) -> None:
        while (job := self._next()) is not None:
            error: BaseException | None = None
            try:
                job.work(job)
            except BaseException as failure:  # Whatever it is, the loop has to know.
                error = failure
                # At once, for it may be the end of the program, and nobody asks any more.
                _log.error("%s: %s: %s", job.decision.name, type(error).__name__, error)
            with self._news:
                self._before = self._manifest()
                self._jobs.popleft()
                self._outcomes.append(Outcome(job.decision, job.is_saved, error))
                self._news.notify_all()
            if error is not None:
                self._on_failure()
            del job, error

    def _next(self) -> Job | None:
        with self._news:
            if self._jobs:
                return self._jobs[0]
            self._thread = None
            return None


class _Unfinished(Protocol):
    """What the program must not end without."""

    def finish(self) -> object:
        """Wait until all is done: nothing else is going to come."""
        ...


_live: weakref.WeakSet[_Unfinished] = weakref.WeakSet()


def finish_at_exit(unfinished: _Unfinished) -> None:
    """Have the interpreter wait for it, if it is still there at the end of the main thread."""
    _live.add(unfinished)


def _finish_all() -> None:
    for unfinished in list(_live):
        unfinished.finish()


def _at_exit(call: Callable[[], Any]) -> None:
    """Have it called when the main thread ends, while executors (and so storages that use them) still work.

    The interpreter would wait for the thread anyway, but turns executors off before it does.
    """
    assert _executors is not None, "it is imported for its hook"
    register = getattr(threading, "_register_atexit", None)
    if register is not None:
        register(call)


_at_exit(_finish_all)
