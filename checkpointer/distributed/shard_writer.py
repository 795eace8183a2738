"""Sharded states written behind the training: each rank copies its part, and waits for rank 0's word on it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import attrs

from checkpointer.errors import RanksError
from checkpointer.ports import FolderFormat, Mailbox, Snapshotting, Taken
from checkpointer.save.background import finish_at_exit

__all__ = ["NumberedCopies", "NumberedCopy", "ShardWriter"]

SILENCE_S: Final = 60.0
"""Seconds without a sign of life from rank 0 after which a rank that has come to its end waits for its word no more."""
BEAT_S: Final = 5.0
"""Seconds between two signs of life."""
LETTING_GO_S: Final = 10.0
"""Seconds that a copy at most waits for the memory of one that is written already."""

SHORTEST_LOOK_S: Final = 0.01
LONGEST_LOOK_S: Final = 0.5

NOTHING: Final = ""
"""Rank 0's word on a copy that nobody writes."""
ALIVE: Final = "alive"

_log = logging.getLogger("checkpointer")


@attrs.define
class _Copy:
    """One rank's part of a sharded state, until it is written or given up."""

    taken: Taken
    is_begun: bool = False
    """Whether rank 0's word on it was heard."""


class ShardWriter:
    """One rank's copies, each under the number that it has on all ranks.

    The threads of all ranks write a copy together, in a process group of their own; each but rank 0's begins when it
    finds rank 0's word: where to, or that there is nothing to write. Nobody waits in a collective that not all join.

    Args:
        rank: This process's number.
        mailbox: Where rank 0 leaves word; None if there is no other rank.
        payload: Writes a copy together with the other ranks' of that number, in the mailbox's group.
        snapshots: Copies a state.
        copies: How many there are at a time.
    """

    def __init__(
        self, rank: int, mailbox: Mailbox | None, payload: FolderFormat, snapshots: Snapshotting, copies: int
    ) -> None:
        self._rank = rank
        self._mailbox = mailbox
        self._payload = payload
        self._snapshots = snapshots
        self._limit = copies
        self._copies: dict[int, _Copy] = {}
        self._released = threading.Condition()
        self._told: set[int] = set()
        self._thread: threading.Thread | None = None
        self._is_closing = False
        self._shows_life = False
        self._sign = 0.0, ""
        finish_at_exit(self)

    # In the loop

    def copy(self, number: int, state: Any) -> None:
        """Copy this rank's part. On all ranks; those that follow begin to look for rank 0's word.

        Raises:
            SaveError: If it cannot be copied.
        """
        self._make_room()
        self._copies[number] = _Copy(self._snapshots.take(state))
        before = self._thread
        try:
            if self._rank:
                self._thread = _start(lambda: self._follow(number, before), daemon=False)
            elif self._mailbox is not None:
                with self._released:
                    starts, self._shows_life = not self._shows_life, True
                if starts:
                    _start(self._show_life, daemon=True)
        except RuntimeError:
            self._thread = before
            self._shows_life = False
            self._forget(number)
            raise

    def _make_room(self) -> None:
        """Have the memory of copies that are done with: written ones in a moment, and those that rank 0 has dropped."""
        if not self._rank or self._mailbox is None:
            return
        for number, copy in list(self._copies.items()):
            # Its turn comes only after the one before it, which may take long.
            if not copy.is_begun and self._mailbox.look(str(number)) == NOTHING:
                self._forget(number)
        with self._released:
            self._released.wait_for(lambda: len(self._copies) < self._limit, LETTING_GO_S)

    def _forget(self, number: int) -> None:
        with self._released:
            copy = self._copies.pop(number, None)
            if copy is not None:
                copy.taken.release()
            self._released.notify_all()

    def _wait(self, timeout: float | None = None) -> bool:
        thread = self._thread
        if not self._rank or thread is None or thread is threading.current_thread():
            return True
        thread.join(timeout)
        return not thread.is_alive()

    def finish(self, timeout: float | None = None) -> bool:
        """Wait until this rank has written what it has to write, or rank 0 is silent for too long.

        Args:
            timeout: Seconds to wait at most; None waits as long as it takes.

        Returns:
            Whether it has.
        """
        self._sign = time.monotonic(), ""
        self._is_closing = True
        return self._wait(timeout)

    def close(self, timeout: float | None = None) -> None:
        """Finish, and give the group back, unless it is still used after ``timeout`` seconds."""
        if self.finish(timeout) and self._mailbox is not None:
            self._mailbox.close()

    # On rank 0's threads

    def state(self, number: int) -> Any:
        """Return this rank's part of a copy, once all of it is there."""
        copy = self._copies.get(number)
        if copy is None:
            msg = f"rank {self._rank} has no copy of its state any more"
            raise RanksError(msg)
        return copy.taken.wait()

    def write(self, number: int, path: str) -> None:
        """Write a copy to a new folder, together with the other ranks. On rank 0."""
        self._tell(number, path)
        self._write(number, path)

    def release(self, number: int) -> None:
        """Let go of a copy, on all ranks, written or not. On rank 0; twice does nothing."""
        try:
            self._tell(number, NOTHING)
        except Exception as error:
            _log.warning("the other ranks cannot be told to drop their copy of a state: %r", error)
        self._forget(number)

    def _tell(self, number: int, word: str) -> None:
        if self._mailbox is not None and number not in self._told:
            self._mailbox.post(str(number), word)
            self._told.add(number)

    def _show_life(self) -> None:
        """While there are copies, let the others see that rank 0 is there, whatever its writer thread is at."""
        assert self._mailbox is not None, "there are others"
        try:
            while self._shows_life:
                self._mailbox.post(ALIVE, str(time.monotonic()))
                with self._released:
                    self._released.wait_for(lambda: not self._copies, BEAT_S)
                    self._shows_life = bool(self._copies)
        except Exception as error:
            self._shows_life = False
            _log.warning("the other ranks cannot be told that rank 0 is at work: %r", error)

    # On the writer threads of all

    def _write(self, number: int, path: str, error: Exception | None = None) -> None:
        state: Any = None
        try:
            state = self.state(number)
        except Exception as failure:
            error = error or failure
        self._meet(number, error)
        self._payload.write_folder(state, path)

    def _meet(self, number: int, error: Exception | None) -> None:
        """Go on only together: if one rank cannot, or is at another copy, none may be left in a collective.

        Raises:
            RanksError: If one cannot, or this rank is behind the others.
        """
        said = []
        while self._mailbox is not None:
            said = self._mailbox.gather((number, repr(error) if error is not None else ""))
            if number < max(other for other, _ in said):
                msg = f"rank {self._rank} came too late to write its part"
                raise RanksError(msg)
            if all(other == number for other, _ in said):
                break
        if error is not None:
            raise error
        if problems := [f"rank {rank}: {problem}" for rank, (_, problem) in enumerate(said) if problem]:
            raise RanksError("; ".join(problems))

    def _follow(self, number: int, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()
        try:
            path, failure = self._word(number)
            if path != NOTHING:
                self._write(number, path, failure)
        except Exception as error:  # Rank 0 has it too, and tells the loops.
            _log.error("rank %d: its part of a state was not written: %s: %s", self._rank, type(error).__name__, error)
        finally:
            self._forget(number)

    def _word(self, number: int) -> tuple[str, Exception | None]:
        """Return rank 0's word on a copy, whenever it comes, or why it cannot be looked for.

        Raises:
            RanksError: If this rank has come to its end, and rank 0 gives no sign of life.
        """
        assert self._mailbox is not None, "rank 0 is another process"
        pause = SHORTEST_LOOK_S
        try:
            while (word := self._mailbox.look(str(number))) is None:
                self._check_life()
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_LOOK_S)
        except RanksError:
            raise
        except Exception as error:  # Rank 0 may wait for this rank all the same.
            return "?", error
        if (copy := self._copies.get(number)) is not None:
            copy.is_begun = True
        return word, None

    def _check_life(self) -> None:
        if not self._is_closing:
            return
        assert self._mailbox is not None, "rank 0 is another process"
        sign = self._mailbox.look(ALIVE) or ""
        if sign != self._sign[1]:
            self._sign = time.monotonic(), sign
        elif time.monotonic() > self._sign[0] + SILENCE_S:
            msg = f"rank 0 has not said whether it is to be written, and gave no sign of life for {SILENCE_S:.0f} s"
            raise RanksError(msg)


def _start(target: Callable[[], None], *, daemon: bool) -> threading.Thread:
    thread = threading.Thread(target=target, name="checkpointer-shards", daemon=daemon)
    thread.start()
    return thread


@attrs.define
class NumberedCopies:
    """How rank 0's manager takes copies: on all ranks, under one number."""

    behind: ShardWriter
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
    behind: ShardWriter

    def wait(self) -> NumberedCopy:
        """Return itself: each rank waits for its own part."""
        return self

    def release(self) -> None:
        """See `ShardWriter.release`."""
        self.behind.release(self.number)
