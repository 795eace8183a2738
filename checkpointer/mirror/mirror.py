"""The second tier: copies committed checkpoints to another storage in the background, and fetches them from there.

A mirror is an ordinary directory, with records, aliases and rules of its own. What is on it and what is missing
follows from the records on both sides: a copy has the token of its original, whatever name it has there. So nothing
needs to be remembered across restarts, and a copy that was interrupted is simply still missing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import attrs

from checkpointer._display import size_text
from checkpointer.commit.directory import Directory
from checkpointer.commit.index import Listing, load
from checkpointer.commit.signing import HMACKey
from checkpointer.errors import (
    CheckpointerWarning,
    CorruptError,
    StorageError,
)
from checkpointer.mirror.plan import Mirror, MirrorStatus, lost, plan, retry_after
from checkpointer.policy.policy import Policy
from checkpointer.policy.retention import KeepBest
from checkpointer.ports import Storage
from checkpointer.records.manifest import Manifest
from checkpointer.records.record import Record
from checkpointer.restore.fetch import MirrorSnapshot
from checkpointer.storage.drivers import without_password
from checkpointer.storage.opening import Where, open_storage
from checkpointer.storage.owner import new_owner, release
from checkpointer.storage.same_place import SamePlaceError, refuse_same, refuse_same_by_trial

__all__ = ["MirrorThread", "open_mirror"]

T = TypeVar("T")

PROGRESS_S = 5.0
"""Seconds between two lines of progress while `MirrorThread.close` waits."""
LOOK_S = 60.0
"""Seconds that a restore waits for the mirror's listing before it goes on without."""

_log = logging.getLogger("checkpointer")


class MirrorThread:
    """Keeps a copy of what a directory has, on a thread of its own: its caller never waits for the mirror's storage.

    Args:
        mirror: What was asked for; its storage is opened on the thread.
        policy: What lives on the mirror, and under which names.
        source: The storage that is mirrored.
        trust: The key that signs the mirror's records, and without which none of them is believed.
        copies: Whether to copy; without it the mirror is only looked at.
    """

    def __init__(
        self,
        mirror: Mirror,
        policy: Policy,
        source: Storage,
        *,
        trust: HMACKey | None,
        copies: bool,
    ) -> None:
        self._where = mirror.where
        self._policy = policy
        self._source = source
        self._options = mirror.options
        self._trust = trust
        self._copies = copies
        self._pid = os.getpid()
        self._thread: threading.Thread | None = None
        # Guarded by the condition, which nobody holds while waiting for a storage:
        self._news = threading.Condition()
        self._here: Manifest | None = None
        self._done: Manifest | None = None
        self._told: dict[str, Record] = {}
        self._finishing = False
        self._stopped = False
        # Written by the thread alone, read by anybody:
        self._there = Manifest()
        self._skipped: frozenset[tuple[str, str]] = frozenset()
        self._error = ""
        # The thread's own:
        self._directory: Directory | None = None
        self._owner = ""
        self._said: set[str] = set()

    def __str__(self) -> str:
        return without_password(str(self._where))

    def update(self, manifest: Manifest) -> None:
        """Take in what there is to mirror now. Returns at once."""
        if not self._copies:
            return
        with self._news:
            if self._stopped or self._finishing:
                return
            self._here = manifest
            if manifest.own:
                self._told[manifest.own[-1].token] = manifest.own[-1]
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="checkpointer-mirror", daemon=True)
                self._thread.start()
            self._news.notify_all()

    @property
    def status(self) -> MirrorStatus:
        """How far the copies are, without asking the mirror."""
        return MirrorStatus(behind=tuple(record.name for record in self._missing), error=self._error)

    @property
    def _missing(self) -> tuple[Record, ...]:
        here = self._here
        return plan(self._policy, here, self._there, self._skipped).missing if here is not None else ()

    def close(self, timeout: float) -> None:
        """Wait until everything is mirrored, ``timeout`` seconds at most; warn about what is not."""
        thread = self._thread
        if os.getpid() != self._pid:
            return  # In a forked child there is nothing to wait for, and the lock may have been held.
        with self._news:
            self._finishing = True
            self._news.notify_all()
        deadline = time.monotonic() + timeout
        while thread is not None and thread.is_alive() and (left := deadline - time.monotonic()) > 0:
            missing = self._missing
            size = size_text(sum(record.size for record in missing))
            _log.info("mirror %s: %s to go (checkpoints: %d)", self, size, len(missing))
            thread.join(min(left, PROGRESS_S))
        self.stop()
        if self._here is not self._done:
            names = ", ".join(self.status.behind) or "nothing but records or aliases"
            why = f" ({self._error})" if self._error else ""
            msg = f"the mirror {self} is behind{why}; not mirrored: {names}. The run's next process goes on with it"
            warnings.warn(msg, CheckpointerWarning, stacklevel=3)

    def stop(self) -> None:
        """Let the thread end after what it is doing, finished or not."""
        # In a forked child there is no thread, and its lock may have been held.
        if os.getpid() == self._pid:
            with self._news:
                self._stopped = True
                self._news.notify_all()

    # On the thread

    def _run(self) -> None:
        failures = 0
        while self._await_news():
            try:
                self._catch_up()
            except SamePlaceError as error:
                self._failed(error)
                return
            except Exception as error:  # Whatever is wrong with the mirror, training goes on.
                failures += 1
                self._failed(error)
                self._pause(retry_after(failures, random.random()))
            else:
                failures = 0
        if self._directory is not None:
            # All is copied; what is left unsaid here is said anew by the next process.
            with contextlib.suppress(Exception):
                self._directory.close()
            release(self._owner)

    def _await_news(self) -> bool:
        """Wait for something to do; return whether there is any."""
        with self._news:
            self._news.wait_for(lambda: self._stopped or self._finishing or self._here is not self._done)
            return not self._stopped and self._here is not self._done

    def _pause(self, seconds: float) -> None:
        """Wait; news do not cut it short, but the end of the training does, once."""
        with self._news:
            was_finishing = self._finishing
            self._news.wait_for(lambda: self._stopped or self._finishing != was_finishing, seconds)

    def _failed(self, error: Exception) -> None:
        kind = StorageError if isinstance(error, SamePlaceError) else type(error)
        self._error = f"{kind.__name__}: {error}"
        if self._error not in self._said:
            self._said.add(self._error)
            again = "" if isinstance(error, SamePlaceError) else ", and it is tried again"
            _log.warning("mirror %s: %s; training goes on%s", self, self._error, again)
        # The next try starts from what is really there. A new owner, so that it may finish what this one left.
        self._directory = None
        release(self._owner)

    def _catch_up(self) -> None:
        """Copy one after the other, looking anew before each what is missing by now; return when nothing is."""
        while not self._stopped:
            with self._news:
                here, told = self._here, dict(self._told)
            assert here is not None, "there are news"
            directory = self._connected(here)
            self._there = directory.manifest
            self._say_lost(here, told)
            todo = plan(self._policy, here, self._there, self._skipped)
            for record in todo.changed:
                directory.rewrite(record)
            if todo.missing:
                self._copy(todo.missing[0], directory)
            aside = directory.manifest.aside
            directory.look_before_retiring(spare=todo.kept)
            if directory.manifest.aside is not aside:
                continue  # It is copied again.
            directory.point_aliases()
            directory.retire(spare=todo.kept)
            self._there = directory.manifest
            if todo.missing:
                continue
            if directory.transaction.unfinished:
                msg = f"{', '.join(directory.transaction.unfinished)} could not be deleted"
                raise StorageError(msg)
            self._caught_up(here)
            return

    def _caught_up(self, here: Manifest) -> None:
        if self._error:
            _log.info("mirror %s: caught up", self)
        self._error = ""
        self._said.clear()
        with self._news:
            self._done = here

    def _connected(self, here: Manifest) -> Directory:
        if self._directory is None:
            self._owner = new_owner()
            storage = open_storage(self._where, self._owner, self._options)
            refuse_same(self._source, storage)
            refuse_same_by_trial(self._source, storage)
            self._directory = Directory(
                storage, self._owner, self._policy, run=here.run, label=here.label, writes=True, trust=self._trust
            )
        self._directory.see(here.run, here.line)
        self._directory.note(here.seen)
        self._directory.begin()
        return self._directory

    def _copy(self, record: Record, directory: Directory) -> None:
        try:
            directory.add(directory.copy_in(record, self._source, record.name))
        except CorruptError as error:
            # Retired, replaced or damaged here. If it only has another name by now, it is tried under that one.
            self._skipped |= {(record.token, record.name)}
            _log.warning("mirror %s: %s; it is not mirrored", self, error)

    def _say_lost(self, here: Manifest, told: Mapping[str, Record]) -> None:
        unsaid = [record for record in told.values() if (record.token, record.name) not in self._skipped]
        names = [record.name for record in lost(self._policy, here, self._there, unsaid)]
        if names:
            _log.warning("mirror %s: retired here before they could be mirrored: %s", self, ", ".join(names))
        waiting = {record.token for record in here.own} - {record.token for record in self._there.records}
        with self._news:
            for token in told.keys() - waiting:
                del self._told[token]

    # For a restore, on its thread

    def look(self, seconds: float = LOOK_S) -> MirrorSnapshot:
        """Return what the mirror holds; if it does not say so in time, that is a problem that the fetcher carries."""
        try:
            return _within(seconds, self._look)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            return MirrorSnapshot(problems=(f"what the mirror {self} may hold, which could not be reached ({why})",))

    def _look(self) -> MirrorSnapshot:
        # Its own storage: the thread's may be in the middle of something.
        owner = new_owner()
        try:
            storage = open_storage(self._where, owner, self._options)
            listing = load(storage, self._trust)
        finally:
            release(owner)
        damaged = (f"on the mirror {problem}" for problem in listing.damaged.values())
        records = {record.token: record for record in _candidates(listing)}
        return MirrorSnapshot(storage=storage, records=records, problems=tuple(damaged))


def _candidates(listing: Listing) -> Iterator[Record]:
    """Yield the records that may have a payload. Which of them has is proven by digest when one is fetched."""
    for entry in listing.entries.values():
        if entry.status == "committed":
            yield entry.record
        elif entry.status == "pending":
            found = {entry.record.name, *(name for name in listing.files if name.startswith(entry.record.name + "/"))}
            size = sum(listing.files[name].size for name in found if name in listing.files)
            yield from (record for record in (entry.previous, entry.record) if record and record.size == size)


def _within(seconds: float, call: Callable[[], T]) -> T:
    """Return what ``call`` returns or raise what it raises, but raise `TimeoutError` if it takes longer."""
    answers: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:  # It belongs to the one who asked.
            answers.put((None, error))

    threading.Thread(target=work, name="checkpointer-mirror-look", daemon=True).start()
    try:
        value, error = answers.get(timeout=seconds)
    except queue.Empty:
        msg = f"no answer within {seconds:g} s"
        raise TimeoutError(msg) from None
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


# Construction


def open_mirror(
    mirror: Mirror | Where | None, policy: Policy, source: Storage, *, trust: HMACKey | None, copies: bool
) -> MirrorThread | None:
    """Return what keeps the mirror, or None if none is asked for. Does not touch its storage.

    Raises:
        StorageError: If it is the directory itself.
    """
    if mirror is None:
        return None
    if not isinstance(mirror, Mirror):
        mirror = Mirror(mirror)
    refuse_same(source, mirror.where)
    if mirror.keep is not None:
        ranks = any(isinstance(rule, KeepBest) for rule in mirror.keep)
        policy = attrs.evolve(policy, keep=mirror.keep, best=policy.best if ranks else None)
    return MirrorThread(mirror, policy, source, trust=trust, copies=copies)
