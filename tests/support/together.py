"""Runs a function in several processes with a process group (gloo), and returns the result of each."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from support.forking import CONTEXT

PATIENCE_S = 120.0


class DiedError(Exception):
    """A process ended without a result."""


def together(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``function(rank, *args)`` in ``size`` processes; a rank's exception is its result."""
    with tempfile.TemporaryDirectory() as folder:
        pipes = [CONTEXT.Pipe(duplex=False) for _ in range(size)]
        processes = [
            CONTEXT.Process(target=_work, args=(rank, size, f"{folder}/store", pipes[rank][1], function, args))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        for _, ours in pipes:
            ours.close()
        results = [_result(receiver) for receiver, _ in pipes]
        for rank, process in enumerate(processes):
            process.join(PATIENCE_S)
            if process.is_alive():
                process.kill()
                process.join()
                results[rank] = DiedError("did not end")
    return results


def _result(receiver: Connection) -> Any:
    if not receiver.poll(PATIENCE_S):
        return DiedError("no answer")
    try:
        return receiver.recv()
    except EOFError:
        return DiedError("died")


def _work(rank: int, size: int, store: str, sender: Connection, function: Callable[..., Any], args: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=PATIENCE_S)
    )
    try:
        result = function(rank, *args)
    except BaseException as error:
        traceback.print_exc()
        result = error
    try:
        sender.send(result)
    except Exception:
        sender.send(RuntimeError(repr(result)))
    sender.close()
    if not isinstance(result, BaseException):
        dist.destroy_process_group()
