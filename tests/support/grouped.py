"""Runs a function in its own process group, and signals the group from another process, as a scheduler does."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from support.forking import CONTEXT

PATIENCE_S = 120.0

Wait = Callable[[], None]
"""Waits until the signal was sent. A second call, or a call without a signal, returns at once."""


def in_group(
    function: Callable[..., Any], *args: Any, number: int | None = signal.SIGTERM, start: str = "forkserver"
) -> tuple[int, Any]:
    """Call ``function(wait, *args)``, signal its group once it waits, and return its exit code and result.

    The signal does not come from the parent of the workers that the function starts, and the group is not the test's.
    With ``start="fork"`` the modules of the test need not be imported again.
    """
    context: Any = CONTEXT if start == "forkserver" else multiprocessing.get_context(start)
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, number is not None, function, args))
    process.start()
    theirs.close()
    result = None
    if number is not None and ours.poll(PATIENCE_S):
        assert "here" == ours.recv()
        assert process.pid is not None
        os.killpg(process.pid, number)
        ours.send("sent")
    process.join(PATIENCE_S)
    if process.is_alive():
        process.kill()
        process.join()
    if process.exitcode == 0:
        result = ours.recv()
    assert process.exitcode is not None
    return process.exitcode, result


def _work(pipe: Connection, waits: bool, function: Callable[..., Any], args: Any) -> None:
    import torch

    os.setpgid(0, 0)
    torch.set_num_threads(1)

    def wait() -> None:
        nonlocal waits
        if waits:
            waits = False
            pipe.send("here")
            pipe.recv()

    result: Any = None
    try:
        result = function(wait, *args)
    finally:
        pipe.send(result)
