"""The fork server of all tests in one process. Its children need not import torch, pytest and this library again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from typing import IO, Final

CONTEXT: Final = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "pytest",
        "torch._dynamo",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "torch.distributed.tensor",
        "checkpointer_torch",
        "checkpointer.distributed",
        "checkpointer.testing",
        "support.plain_format",
    ]
)


class Program:
    """A program that is forked instead of started: a process with a pid, signals and an exit code of its own.

    It has the pipes and methods of a `subprocess.Popen` with ``text=True`` that tests need. What it imports that the
    fork server has imported takes no time.

    Args:
        main: Is called in the process; a function of a module.
        arguments: Of ``main``, and of ``sys.argv``.
    """

    def __init__(self, main: Callable[..., object], *arguments: str) -> None:
        pipes = [CONTEXT.Pipe(duplex=False) for _ in range(3)]
        (theirs_in, ours_in), (ours_out, theirs_out), (ours_err, theirs_err) = pipes
        theirs = (theirs_in, theirs_out, theirs_err)
        self._process = CONTEXT.Process(target=_be, args=(main, arguments, *theirs))
        self._process.start()
        # If a test fails before it has ended, this process would wait for it when it ends itself.
        Finalize(self, self._process.kill, exitpriority=0)
        for end in theirs:
            end.close()
        assert self._process.pid is not None, "it was started"
        self.pid = self._process.pid
        self.stdin, self.stdout, self.stderr = _file(ours_in, "w"), _file(ours_out, "r"), _file(ours_err, "r")

    @property
    def returncode(self) -> int:
        """The exit code, or minus the number of the signal that has ended it; once it has ended."""
        code = self.poll()
        assert code is not None, "it runs"
        return code

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and return the exit code."""
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("a forked program", timeout or 0.0)
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it, if it runs."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Read all that it writes, wait for its end, and close the pipes; kill it after ``timeout`` seconds."""
        watchdog = threading.Timer(timeout, self.kill)
        watchdog.start()
        self.stdin.close()
        with self.stdout, self.stderr, ThreadPoolExecutor(1) as pool:
            err = pool.submit(self.stderr.read)
            out = self.stdout.read()
            self.wait()
            watchdog.cancel()
            return out, err.result()

    def close(self) -> None:
        """Kill it, if it runs, and close the pipes."""
        self.kill()
        self.wait()
        for pipe in (self.stdin, self.stdout, self.stderr):
            pipe.close()


def _file(end: Connection, mode: str) -> IO[str]:
    with end:
        return os.fdopen(os.dup(end.fileno()), mode)


def _be(main: Callable[..., object], arguments: tuple[str, ...], *theirs: Connection) -> None:
    for number, end in enumerate(theirs):
        os.dup2(end.fileno(), number)
        end.close()
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.argv = [main.__module__, *arguments]
    main(*arguments)
