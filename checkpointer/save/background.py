"""The writer thread: it executes jobs in order while the loop goes on."""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401  Its exit hook must be registered before ours, so that it runs later.
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Final, Literal

import attrs

from checkpointer.errors import PolicyError, SaveError
from checkpointer.policy.decide import Attach, Save, after
from checkpointer.policy.policy import Policy
from checkpointer.records.manifest import Manifest

Busy = Literal["wait", "skip"]
"""What happens if a save is due while another is unfinished."""

POLL_S: Final = 1.0
"""Seconds between two checks of a waiting thread that the writer thread is alive."""

_log = logging.getLogger("checkpointer")


@attrs.frozen(kw_only=True)
class BackgroundStatus:
    """The unfinished work of the writer thread, and its cost for the loop so far."""

    unfinished: tuple[str, ...] = ()
    """Names of the checkpoints that are being written or wait for their turn, oldest first."""
    num_waits: int = 0
    """How often the loop waited because a save was due while another was unfinished."""
    waited_s: float = 0.0
    """Seconds that the loop waited in total."""
    num_skipped: int = 0
    """How many saves were dropped for a newer one before they began (``background="skip"``)."""


@attrs.define
class Job:
    """One decision that the writer thread executes."""

    decision: Save | Attach
    work: Callable[[Job], None]
    """Executes the decision; called with the job, on the writer thread."""
    drop: Callable[[], None]
    """Releases what the work needs; called if the work is never begun."""
    is_saved: bool = False
    """Whether the checkpoint counts: the work sets it after the commit."""


@attrs.frozen
class Outcome:
    """How a job ended."""

    decision: Save | Attach
    is_saved: bool
    error: BaseException | None = None


def as_busy(background: object) -> Busy | None:
    """Check the argument ``background=``. None writes in the loop."""
    if background is None or background == "wait" or background == "skip":
        return background
    msg = f"background is {background!r}; expected 'wait', 'skip' or None"
    raise PolicyError(msg)


def copies_of(busy: Busy) -> int:
    """Return how many copies of a state exist at a time: the one that is being written, and one that waits."""
    return 1 if busy == "wait" else 2


class Background:
    """Executes jobs in order on a thread, which ends when there are none.

    ``manifest`` returns the records as the finished jobs have left them. ``on_failure`` is called on the thread after a
    job has failed, when `collect` can return its outcome.
    """

    def __init__(self, busy: Busy, manifest: Callable[[], Manifest], on_failure: Callable[[], None]) -> None:
        self._busy = busy
        self._manifest = manifest
        self._on_failure = on_failure
        self._num_waits = 0
        self._waited_s = 0.0
        self._num_skipped = 0
        self._start_over()
        wait_at_exit(self.wait)

    def _start_over(self) -> None:
        """Begin without jobs. In a forked child the jobs and the thread belong to the parent."""
        self._pid = os.getpid()
        # Entered itself, because `Condition.__enter__` is Python code: a Ctrl-C in it would keep the lock for ever.
        self._lock = threading.RLock()
        self._condition = threading.Condition(self._lock)
        # The first job is running; the others have not begun.
        self._jobs: deque[Job] = deque()
        self._outcomes: deque[Outcome] = deque()
        self._before = Manifest()
        self._thread: threading.Thread | None = None

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            self._start_over()

    @property
    def is_here(self) -> bool:
        """Whether the caller runs on the writer thread, as a listener does."""
        self._check_process()
        return threading.current_thread() is self._thread

    @property
    def status(self) -> BackgroundStatus:
        """The unfinished work. Does not wait for it."""
        self._check_process()
        with self._lock:
            names = tuple(job.decision.name for job in self._jobs if isinstance(job.decision, Save))
        return BackgroundStatus(
            unfinished=names, num_waits=self._num_waits, waited_s=self._waited_s, num_skipped=self._num_skipped
        )

    def outlook(self, policy: Policy) -> Manifest:
        """Return the records as they will be once every job is done."""
        self._check_process()
        with self._lock:
            if not self._jobs:
                return self._manifest()
            manifest = self._before
            for job in self._jobs:
                manifest = after(job.decision, manifest, policy)
            return manifest

    def make_room(self, step: int) -> list[int]:
        """Wait until another save may begin, or drop one that has not begun; return the dropped steps."""
        self._check_process()
        if self._busy == "skip":
            return self._drop_waiting(step)
        started = time.monotonic()
        with self._lock:
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
        with self._lock:
            waiting = [job for job in list(self._jobs)[1:] if isinstance(job.decision, Save)]
            steps = {job.decision.observation.step for job in waiting}
            # If a step is not saved, its late metrics are dropped, too.
            dropped = [job for job in list(self._jobs)[1:] if job.decision.observation.step in steps]
            for job in dropped:
                self._jobs.remove(job)
            self._num_skipped += len(waiting)
            self._condition.notify_all()
        for job in dropped:
            job.drop()
        for job in waiting:
            _log.warning("%s is not saved: it waited for its turn until step %d was due", job.decision.name, step)
        return sorted(steps)

    def submit(self, job: Job) -> None:
        """Queue a job. Returns at once.

        Raises:
            RuntimeError: If the thread cannot be started.
        """
        self._check_process()
        with self._lock:
            if not self._jobs:
                self._before = self._manifest()
            self._jobs.append(job)
            if self._thread is None or not self._thread.is_alive():
                # The interpreter waits for it, because it is not a daemon.
                self._thread = threading.Thread(target=self._run, name="checkpointer-writer", daemon=False)
                try:
                    self._thread.start()
                except RuntimeError:
                    self._thread = None
                    self._jobs.remove(job)
                    raise

    def wait(self, timeout: float | None = None) -> bool:
        """Wait up to ``timeout`` seconds until every job is done; return whether it is. On the thread: True at once."""
        if self.is_here:
            return True
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            while self._jobs:
                if deadline is not None and time.monotonic() >= deadline:
                    return False
                self._wait_a_little(deadline)
        return True

    def _wait_a_little(self, deadline: float | None) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._drop_all()
            return
        left = POLL_S if deadline is None else min(POLL_S, max(0.0, deadline - time.monotonic()))
        self._condition.wait(left)

    def _drop_all(self) -> None:
        """Record an error for each job that a vanished thread left."""
        while self._jobs:
            job = self._jobs.popleft()
            error = SaveError(f"the writer thread is gone, and {job.decision.name} with it")
            _log.error("%s", error)
            self._outcomes.append(Outcome(job.decision, job.is_saved, error))
            job.drop()

    def collect(self) -> Outcome | None:
        """Return how the next finished job ended, once for each job; None if there are no more."""
        self._check_process()
        with self._lock:
            if self._jobs and (self._thread is None or not self._thread.is_alive()):
                self._drop_all()
            return self._outcomes.popleft() if self._outcomes else None

    def _run(self) -> None:
        while (job := self._next()) is not None:
            error: BaseException | None = None
            try:
                job.work(job)
            except BaseException as failure:  # The loop raises it.
                error = failure
                # At once, because at the end of the program the loop does not collect outcomes any more.
                _log.error("%s: %s: %s", job.decision.name, type(error).__name__, error)
            with self._lock:
                self._before = self._manifest()
                if self._jobs and self._jobs[0] is job:
                    self._jobs.popleft()
                self._outcomes.append(Outcome(job.decision, job.is_saved, error))
                self._condition.notify_all()
            if error is not None:
                self._on_failure()
            del job, error

    def _next(self) -> Job | None:
        with self._lock:
            # A Ctrl-C may interrupt the start of a thread. Then another one was started, and this one comes late.
            if self._thread is not threading.current_thread():
                return None
            if self._jobs:
                return self._jobs[0]
            self._thread = None
            return None


_waits: set[weakref.WeakMethod[Callable[[], object]]] = set()


def wait_at_exit(wait: Callable[[], object]) -> None:
    """Call a method that waits for an object's work when the main thread ends, if the object still exists then."""
    _waits.add(weakref.WeakMethod(wait, _waits.discard))


def _finish_all() -> None:
    for reference in list(_waits):
        if (wait := reference()) is not None:
            wait()


# The interpreter also waits for the thread, but shuts executors down before. A storage may need them.
_register_at_exit = getattr(threading, "_register_atexit", None)
if _register_at_exit is not None:
    _register_at_exit(_finish_all)
