"""Copies of large tensors by several threads, and what an interrupt leaves behind."""

from __future__ import annotations

import functools
import gc
import os
import signal
import threading
import weakref
from typing import Any

import pytest
import torch

from checkpointer._parallel import ahead
from checkpointer.formats.tensor_bytes import move

MB = 1 << 20


class Owner:
    """What owns the memory that is copied."""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a second core, for a second thread")
def test_a_thread_that_a_second_ctrl_c_leaves_behind_holds_the_memory_that_it_copies() -> None:
    """Else it would read freed memory. It ends after its piece."""
    begun, may_end, main = threading.Event(), threading.Event(), threading.current_thread()
    inside, has_left = threading.Event(), threading.Event()

    def stop(*_: object) -> None:
        if inside.is_set():
            raise KeyboardInterrupt

    def interrupt() -> None:
        while begun.wait(20) and not has_left.wait(0.2):
            os.kill(os.getpid(), signal.SIGINT)

    def piece(owner: Owner, number: int) -> None:
        if threading.current_thread() is not main:
            begun.set()
            may_end.wait(20)
        else:
            begun.wait(20)

    owner = Owner()
    watched = weakref.ref(owner)
    user = threading.Thread(target=interrupt, daemon=True)
    before, handler = {*threading.enumerate(), user}, signal.signal(signal.SIGINT, stop)
    try:
        user.start()
        inside.set()
        for _ in ahead(functools.partial(piece, owner), 100):
            pass
    except KeyboardInterrupt:
        inside.clear()
    finally:
        has_left.set()
        user.join(20)
        signal.signal(signal.SIGINT, handler)
    del owner
    (left,) = {*threading.enumerate()} - before
    assert watched() is not None
    may_end.set()
    left.join(20)
    gc.collect()
    assert (False, None) == (left.is_alive(), watched())


def test_large_tensors_are_moved_whole() -> None:
    """In pieces, with a last one that is smaller. Afterwards nothing holds the owners."""
    source = torch.randint(0, 256, (70 * MB + 5,), dtype=torch.uint8)
    target: Any = torch.zeros_like(source)
    owner = Owner()
    watched = weakref.ref(owner)
    move([(target.data_ptr(), source.data_ptr(), len(source))], (source, target, owner))
    del owner
    assert torch.equal(source, target)
    assert watched() is None
