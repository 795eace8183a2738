"""Reads parts of a file in parallel, straight into the buffers that the caller passes."""

from __future__ import annotations

import asyncio
import errno
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, Final, TypeVar

import attrs

T = TypeVar("T")

PARTS_READ_AT_ONCE: Final = 8
"""A store may limit the speed of each connection, so several are used. They need no memory but their own buffers."""
_PART: Final = 16 << 20


@attrs.define(eq=False)
class Part:
    """Adjacent bytes of a file, which one request reads. A request that was cut goes on at ``position``."""

    position: int
    """Offset in the file of the next byte."""
    end: int
    """Offset behind the last byte."""
    _views: deque[memoryview]
    """The buffers to fill, in order."""
    num_filled: int
    """How many of the caller's pieces are filled when this part and all before it are."""

    def write(self, data: bytes) -> None:
        """Fill the next bytes; raise `OSError` if there are more than requested."""
        chunk = memoryview(data)
        if len(chunk) > self.end - self.position:
            msg = f"the server sent more than the bytes up to {self.end} that were requested"
            raise OSError(errno.EPROTO, msg)
        while chunk:
            view = self._views.popleft()
            taken = chunk[: len(view)]
            view[: len(taken)] = taken
            if len(taken) < len(view):
                self._views.appendleft(view[len(taken) :])
            self.position += len(taken)
            chunk = chunk[len(taken) :]


def parts_of(pieces: Sequence[tuple[int, memoryview]], size: int = _PART) -> list[Part]:
    """Cut and join pieces to parts of at most ``size`` bytes. A gap between two pieces begins a new part."""
    parts: list[Part] = []
    start, end = 0, 0
    views = deque[memoryview]()
    for number, (offset, buffer) in enumerate(pieces):
        view = buffer.cast("B")
        while view:
            if views and (offset != end or end - start == size):
                parts.append(Part(start, end, views, number))
                views = deque()
            if not views:
                start = end = offset
            taken = view[: size - (end - start)]
            views.append(taken)
            view = view[len(taken) :]
            offset += len(taken)
            end = offset
    return [*parts, Part(start, end, views, len(pieces))] if pieces else []


def read_parts(
    loop: asyncio.AbstractEventLoop, parts: Sequence[Part], fill: Callable[[Part], Awaitable[None]]
) -> Iterator[int]:
    """Fill the parts on an event loop of another thread; see `SupportsPieces.read_pieces` for what is yielded."""
    slots = asyncio.Semaphore(PARTS_READ_AT_ONCE)

    async def limited(part: Part) -> None:
        async with slots:
            await fill(part)

    async def begin() -> list[asyncio.Task[None]]:
        return [asyncio.create_task(limited(part)) for part in parts]

    tasks = _run(loop, begin())
    try:
        for part, task in zip(parts, tasks, strict=True):
            _run(loop, _wait(task))
            yield part.num_filled
    finally:
        # When this returns, no task writes into the caller's buffers any more.
        _run(loop, _end(tasks))


async def _wait(task: asyncio.Task[None]) -> None:
    await task


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _run(loop: asyncio.AbstractEventLoop, do: Any) -> Any:
    return asyncio.run_coroutine_threadsafe(do, loop).result()
