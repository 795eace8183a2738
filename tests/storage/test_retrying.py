"""What fails for a while is tried again, by threads and by coroutines alike."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from checkpointer.storage.retry import Retry

QUICK = Retry(deadline_s=10, first_wait_s=0.001)


def in_a_thread(do: Callable[[], str]) -> str:
    return QUICK(do, "do it")


def in_a_loop(do: Callable[[], str]) -> str:
    async def request() -> str:
        return do()

    return asyncio.run(QUICK.run(lambda: request(), "do it"))


@pytest.mark.parametrize("run", [in_a_thread, in_a_loop])
def test_it_is_tried_again_until_it_succeeds(run: Callable[[Callable[[], str]], str]) -> None:
    """The result is that of the last attempt, and no coroutine that nobody awaits."""
    failures = [ConnectionResetError("once"), TimeoutError("twice")]

    def do() -> str:
        if failures:
            raise failures.pop(0)
        return "done"

    assert "done" == run(do)
    assert [] == failures


@pytest.mark.parametrize("run", [in_a_thread, in_a_loop])
def test_what_will_never_succeed_is_not_tried_again(run: Callable[[Callable[[], str]], str]) -> None:
    """Permission is not a matter of time."""
    attempts = []

    def do() -> str:
        attempts.append(1)
        msg = "not yours"
        raise PermissionError(msg)

    with pytest.raises(PermissionError, match="not yours"):
        run(do)
    assert [1] == attempts
