"""Does many pieces of work with several threads. Each takes the next piece when it has done one."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Final

_MAX_THREADS: Final = 8
_PIECES_PER_THREAD: Final = 4
"""A thread for fewer pieces than this costs more than it gains."""


def ahead(act: Callable[[int], object], count: int) -> Iterator[int]:
    """Call ``act`` with each number below ``count``, on as many threads as there are cores.

    Yield how many of the first numbers are done. While the next one is not, the caller's thread works too. All threads
    have ended when the iterator is exhausted, is closed, or raises what ``act`` has raised. Only if a signal handler
    raises while they are waited for, a thread may still be busy. It holds ``act``, so ``act`` has to hold the memory
    and files that it uses.
    """
    done = bytearray(count)
    todo = iter(range(count))
    lock = threading.Lock()
    errors: list[BaseException] = []

    def work_once() -> bool:
        with lock:
            number = None if errors else next(todo, None)
        if number is None:
            return False
        try:
            act(number)
        except BaseException as error:
            errors.append(error)
            return False
        done[number] = True
        return True

    def work() -> None:
        while work_once():
            pass

    helpers = [threading.Thread(target=work, daemon=True) for _ in range(_num_threads(count) - 1)]
    try:
        with contextlib.suppress(RuntimeError):  # No more threads, or the interpreter ends.
            for helper in helpers:
                helper.start()
        for number in range(count):
            while not done[number]:
                if not work_once():
                    _join(helpers)
                    if errors:
                        raise errors[0]
            yield number + 1
    finally:
        with lock:
            todo = iter(())
        _join(helpers)


def _num_threads(count: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _MAX_THREADS, count // _PIECES_PER_THREAD))


def _join(helpers: list[threading.Thread]) -> None:
    for helper in helpers:
        if helper.ident is not None:
            helper.join()
