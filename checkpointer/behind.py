"""Sharded states written behind the training: each rank copies its part, and waits for rank 0's word on it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import attrs

from checkpointer.background import finish_at_exit
from checkpointer.errors import RanksError
from checkpointer.ports import FolderFormat, Mailbox
from checkpointer.snapshot import Snapshot, Snapshots

__all__ = ["Behind", "NumberedCopies", "NumberedCopy"]

WORD_S: Final = 60.0
"""Seconds for which a rank that has come to its end waits for rank 0's word on a copy."""

SHORTEST_LOOK_S: Final = 0.01
LONGEST_LOOK_S: Final = 0.5

NOTHING: Final = ""
"""Rank 0's word on a copy that nobody writes."""

_log = logging.getLogger("checkpointer")


@attrs.define
class _Copy:
    """One rank's part of a sharded state, until it is written or given up."""

    snapshot: Snapshot
    is_begun: bool = False
    """Whether rank 0's word on it was heard."""


class Behind:
    """One rank's copies, each under the number that it has on all ranks.

    The threads of all ranks write a copy together, in a process group of their own; each but rank 0's begins when it
    finds rank 0's word: where to, or that there is nothing to write. Nobody waits in a collective that not all join.

    Args:
        rank: This process's number.
        mailbox: Where rank 0 leaves word; None if there is no other rank.
        payload: Writes a copy together with the other ranks' of that number, in the mailbox's group.
        copies: How many there are at a time.
    """

    def __init__(self, rank: int, mailbox: Mailbox | None, payload: FolderFormat, copies: int) -> None:
        self._rank = rank
        self._mailbox = mailbox
        self._payload = payload
        self._snapshots = Snapshots(copies)
        self._copies: dict[int, _Copy] = {}
        self._told: set[int] = set()
        self._thread: threading.Thread | None = None
        self._is_closing = False
        finish_at_exit(self)

    # In the loop

    def copy(self, number: int, state: Any) -> None:
        """Copy this rank's part. On all ranks; those that follow begin to look for rank 0's word.

        Raises:
            SaveError: If it cannot be copied.
        """
        self._give_up_what_is_dropped()
        self._copies[number] = _Copy(self._snapshots.take(state))
        if self._rank:
            self._thread = threading.Thread(
                target=self._follow, args=(number, self._thread), name="checkpointer-shards", daemon=False
            )
            try:
                self._thread.start()
            except RuntimeError:
                self._thread = None
                self._forget(number)
                raise

    def _give_up_what_is_dropped(self) -> None:
        """Free the memory of copies that nobody writes: their turn comes only after the one before them."""
        for number, copy in list(self._copies.items()):
            if self._rank and self._mailbox and not copy.is_begun and self._mailbox.look(number) == NOTHING:
                self._forget(number)

    def _forget(self, number: int) -> None:
        copy = self._copies.pop(number, None)
        if copy is not None:
            copy.snapshot.release()

    def wait(self) -> None:
        """Wait until this rank has written what it has to write."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def close(self) -> None:
        """Wait as `wait` does, for rank 0's word no longer than a minute, and give the group back."""
        self._is_closing = True
        self.wait()
        if self._mailbox is not None:
            self._mailbox.close()

    # On rank 0's writer thread

    def state(self, number: int) -> Any:
        """Return rank 0's part of a copy, once all of it is there."""
        return self._copies[number].snapshot.wait()

    def write(self, number: int, path: str) -> None:
        """Write a copy to a new folder, together with the other ranks. On rank 0."""
        self._tell(number, path)
        self._payload.write_folder(self.state(number), path)

    def release(self, number: int) -> None:
        """Let go of a copy, on all ranks, written or not. On rank 0; twice does nothing."""
        self._forget(number)
        try:
            self._tell(number, NOTHING)
        except Exception as error:
            _log.warning("the other ranks cannot be told to drop their copy of a state: %r", error)

    def _tell(self, number: int, word: str) -> None:
        if self._mailbox is not None and number not in self._told:
            self._mailbox.post(number, word)
            self._told.add(number)

    # On the threads of the others

    def _follow(self, number: int, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()
        try:
            path = self._word(number)
            copy = self._copies.get(number)
            if path != NOTHING and copy is not None:
                self._payload.write_folder(copy.snapshot.wait(), path)
        except Exception as error:  # Rank 0 has it too, and tells the loops.
            _log.error("rank %d: its part of a state was not written: %s: %s", self._rank, type(error).__name__, error)
        finally:
            self._forget(number)

    def _word(self, number: int) -> str:
        """Return rank 0's word on a copy, whenever it comes."""
        assert self._mailbox is not None, "rank 0 is another process"
        pause, give_up = SHORTEST_LOOK_S, None
        while (word := self._mailbox.look(number)) is None:
            if give_up is None and (self._is_closing or not threading.main_thread().is_alive()):
                give_up = time.monotonic() + WORD_S
            if give_up is not None and time.monotonic() > give_up:
                msg = f"rank 0 has not said within {WORD_S:.0f} s whether it is to be written"
                raise RanksError(msg)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_LOOK_S)
        if (copy := self._copies.get(number)) is not None:
            copy.is_begun = True
        return word


@attrs.define
class NumberedCopies:
    """How rank 0's manager takes copies: on all ranks, under one number."""

    behind: Behind
    copy: Callable[[int], None]
    """Has every rank copy what it has taken."""
    _next: int = attrs.field(default=0, init=False)

    def take(self, state: Any) -> NumberedCopy:
        """See `checkpointer.ports.Snapshotting`."""
        number, self._next = self._next, self._next + 1
        try:
            self.copy(number)
        except BaseException:
            self.behind.release(number)
            raise
        return NumberedCopy(number, self.behind)


@attrs.frozen
class NumberedCopy:
    """A copy that every rank has its part of."""

    number: int
    behind: Behind

    def wait(self) -> NumberedCopy:
        """Return itself: each rank waits for its own part."""
        return self

    def release(self) -> None:
        """See `Behind.release`."""
        self.behind.release(self.number)
