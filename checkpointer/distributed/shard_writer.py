"""Writes sharded states in the background: each rank copies its part, and writes it when rank 0 posts a path."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs

from checkpointer._secrets import Secrets
from checkpointer.errors import RanksError
from checkpointer.ports import Mailbox, Snapshotting, SupportsFileDigests, Taken
from checkpointer.save.background import wait_at_exit

HEARTBEAT_S: Final = 5.0
"""Seconds between two heartbeats of rank 0."""
HEARTBEAT_TIMEOUT_S: Final = 60.0
"""Seconds without a heartbeat after which a rank that closes no longer waits for rank 0's message."""
RELEASE_TIMEOUT_S: Final = 10.0
"""Seconds that a new copy waits at most for the memory of a written one."""

SHORTEST_POLL_S: Final = 0.01
LONGEST_POLL_S: Final = 0.5

CANCELLED: Final = ""
"""Rank 0's message that a copy is not written."""
HEARTBEAT: Final = "alive"
"""The mailbox's key of rank 0's heartbeats."""

_log = logging.getLogger("checkpointer")


class ShardWriter:
    """One rank's copies, each under the number that it has on all ranks.

    The threads of all ranks write a copy together, in a process group of their own. Other ranks poll the mailbox for
    rank 0's message (the digest's algorithm and a path, or "cancelled") before they start to write. So a rank never
    waits in a collective that another rank does not reach.

    The mailbox is None if this is the only rank. The payload writes in the mailbox's group. There are at most
    ``copies`` at a time.
    """

    def __init__(
        self, rank: int, mailbox: Mailbox | None, payload: SupportsFileDigests, snapshots: Snapshotting, copies: int
    ) -> None:
        self._rank = rank
        self._mailbox = mailbox
        self._payload = payload
        self._snapshots = snapshots
        self._limit = copies
        self._copies: dict[int, Taken] = {}
        self._begun: set[int] = set()
        """The copies whose message from rank 0 was read."""
        self._released = threading.Condition()
        self._posted: set[int] = set()
        self._thread: threading.Thread | None = None
        self._is_closing = False
        self._is_beating = False
        self._heartbeat = 0.0, ""
        wait_at_exit(self.finish)

    # In the loop

    def copy(self, number: int, state: Any) -> None:
        """Copy this rank's part. All ranks call it; the others then start to poll for rank 0's message."""
        self._make_room()
        self._copies[number] = self._snapshots.take(state)
        before = self._thread
        try:
            if self._rank:
                self._thread = _start(lambda: self._follow(number, before), daemon=False)
            elif self._mailbox is not None:
                with self._released:
                    starts, self._is_beating = not self._is_beating, True
                if starts:
                    _start(self._send_heartbeats, daemon=True)
        except RuntimeError:
            self._thread = before
            self._is_beating = False
            self._forget(number)
            raise

    def _make_room(self) -> None:
        """Release cancelled copies, and wait a moment until the memory of written ones is released."""
        if not self._rank or self._mailbox is None:
            return
        for number in self._copies.keys() - self._begun:
            # Its own thread reads the message only after the copy before it is written, which may take long.
            if self._mailbox.look(str(number)) == CANCELLED:
                self._forget(number)
        with self._released:
            self._released.wait_for(lambda: len(self._copies) < self._limit, RELEASE_TIMEOUT_S)

    def _forget(self, number: int) -> None:
        with self._released:
            copy = self._copies.pop(number, None)
            if copy is not None:
                copy.release()
            self._released.notify_all()

    def finish(self, timeout: float | None = None) -> bool:
        """Wait, at most ``timeout`` seconds, until this rank has written its copies or rank 0's heartbeat stops.

        Return whether it has written them.
        """
        self._heartbeat = time.monotonic(), ""
        self._is_closing = True
        return self._join(timeout)

    def _join(self, timeout: float | None = None) -> bool:
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return True
        thread.join(timeout)
        return not thread.is_alive()

    def close(self, timeout: float | None = None) -> None:
        """Finish, and destroy the group, unless it is still used after ``timeout`` seconds."""
        if self.finish(timeout) and self._mailbox is not None:
            self._mailbox.close()

    # On rank 0's threads

    def state(self, number: int) -> Any:
        """Return this rank's part of a copy, once all of it is there."""
        copy = self._copies.get(number)
        if copy is None:
            msg = f"rank {self._rank} has already released its copy of the state"
            raise RanksError(msg)
        return copy.wait()

    def write(self, number: int, path: str, algorithm: str) -> Mapping[str, tuple[int, str]] | None:
        """Do as `SupportsFileDigests.write_digested` with a copy, together with the other ranks. On rank 0."""
        message = f"{algorithm} {path}"
        self._post(number, message)
        return self._write(number, message)

    def release(self, number: int) -> None:
        """Release a copy on all ranks, written or not. On rank 0; a second call does nothing."""
        try:
            self._post(number, CANCELLED)
        except Exception as error:
            _log.warning("rank 0 could not post that a copy of a state is cancelled: %r", error)
        self._forget(number)

    def _post(self, number: int, message: str) -> None:
        if self._mailbox is not None and number not in self._posted:
            self._mailbox.post(str(number), message)
            self._posted.add(number)

    def _send_heartbeats(self) -> None:
        """While there are copies, post heartbeats, whatever rank 0's writer thread does."""
        assert self._mailbox is not None, "there are others"
        try:
            while self._is_beating:
                self._mailbox.post(HEARTBEAT, str(time.monotonic()))
                with self._released:
                    self._released.wait_for(lambda: not self._copies, HEARTBEAT_S)
                    self._is_beating = bool(self._copies)
        except Exception as error:
            self._is_beating = False
            _log.warning("rank 0 could not post a heartbeat: %r", error)

    # On the writer threads of all

    def _write(self, number: int, message: str, error: Exception | None = None) -> Mapping[str, tuple[int, str]] | None:
        state: Any = None
        try:
            state = self.state(number)
        except Exception as failure:
            error = error or failure
        self._synchronize(number, error)
        algorithm, _, path = message.partition(" ")
        with Secrets(path, {}).hidden():
            return self._payload.write_digested(state, path, algorithm=algorithm)

    def _synchronize(self, number: int, error: Exception | None) -> None:
        """Wait for all ranks; raise if one of them failed, or is at another copy: no rank may begin the write then."""
        reports = []
        while self._mailbox is not None:
            reports = self._mailbox.gather((number, repr(error) if error is not None else ""))
            if number < max(other for other, _ in reports):
                msg = f"rank {self._rank} came too late to write its part"
                raise RanksError(msg)
            if all(other == number for other, _ in reports):
                break
        if error is not None:
            raise error
        if problems := [f"rank {rank}: {problem}" for rank, (_, problem) in enumerate(reports) if problem]:
            raise RanksError("; ".join(problems))

    def _follow(self, number: int, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()
        try:
            message, failure = self._poll(number)
            if message != CANCELLED:
                self._write(number, message, failure)
        except Exception as error:  # Rank 0 gets it too, and raises it in the loops.
            _log.error("rank %d: its part of a state was not written: %s: %s", self._rank, type(error).__name__, error)
        finally:
            self._forget(number)

    def _poll(self, number: int) -> tuple[str, Exception | None]:
        """Return rank 0's message about a copy as soon as it is there, or the error of looking for it."""
        assert self._mailbox is not None, "rank 0 is another process"
        pause = SHORTEST_POLL_S
        try:
            while (message := self._mailbox.look(str(number))) is None:
                self._check_heartbeat(self._mailbox)
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_POLL_S)
        except RanksError:
            raise
        except Exception as error:  # Rank 0 may still wait for this rank, which has to report the error.
            return "?", error
        self._begun.add(number)
        return message, None

    def _check_heartbeat(self, mailbox: Mailbox) -> None:
        if not self._is_closing:
            return
        heartbeat = mailbox.look(HEARTBEAT) or ""
        if heartbeat != self._heartbeat[1]:
            self._heartbeat = time.monotonic(), heartbeat
        elif time.monotonic() > self._heartbeat[0] + HEARTBEAT_TIMEOUT_S:
            msg = f"rank 0 has not posted whether to write, and sent no heartbeat for {HEARTBEAT_TIMEOUT_S:.0f} s"
            raise RanksError(msg)


def _start(target: Callable[[], None], *, daemon: bool) -> threading.Thread:
    thread = threading.Thread(target=target, name="checkpointer-shards", daemon=daemon)
    thread.start()
    return thread


@attrs.frozen
class NumberedCopy:
    """A copy that every rank has its part of."""

    number: int
    writer: ShardWriter

    def wait(self) -> NumberedCopy:
        """Return itself: each rank waits for its own part."""
        return self

    def release(self) -> None:
        """See `ShardWriter.release`."""
        self.writer.release(self.number)
