"""A request that fails briefly is repeated, in a thread and in a coroutine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from checkpointer.storage.retry import Retry

QUICK = Retry(deadline_s=10, first_wait_s=0.001)


def in_a_thread(do: Callable[[], str]) -> str:
    return QUICK(do, "a request")


def in_a_loop(do: Callable[[], str]) -> str:
    async def request() -> str:
        return do()

    return asyncio.run(QUICK.run(lambda: request(), "a request"))


@pytest.mark.parametrize("run", [in_a_thread, in_a_loop])
def test_a_request_is_repeated_until_it_succeeds(run: Callable[[Callable[[], str]], str]) -> None:
    """The result is that of the last attempt, and every coroutine is awaited."""
    failures = [ConnectionResetError("once"), TimeoutError("twice")]

    def do() -> str:
        if failures:
            raise failures.pop(0)
        return "done"

    assert "done" == run(do)
    assert [] == failures


@pytest.mark.parametrize("run", [in_a_thread, in_a_loop])
def test_a_permanent_error_is_not_repeated(run: Callable[[Callable[[], str]], str]) -> None:
    """A missing permission is a permanent error."""
    attempts = []

    def do() -> str:
        attempts.append(1)
        msg = "not yours"
        raise PermissionError(msg)

    with pytest.raises(PermissionError, match="not yours"):
        run(do)
    assert [1] == attempts
