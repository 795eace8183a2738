"""The mirror thread copies committed checkpoints to a second storage, and lists it for a restore.

A mirror is an ordinary directory, with records, aliases and rules of its own. The records on both sides determine what
is missing: a copy has the token of its original, and maybe another name. So the thread needs no state of its own after
a restart, and an interrupted copy is simply still missing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from typing import TypeVar

import attrs

from checkpointer._display import size_text
from checkpointer._secrets import without_secrets
from checkpointer.commit.directory import Directory
from checkpointer.commit.index import Listing, load
from checkpointer.commit.lease import Lease
from checkpointer.commit.signing import HMACKey
from checkpointer.errors import (
    ConflictError,
    CorruptError,
    FencedError,
    RunInUseError,
    StorageError,
    UntrustedError,
    warn,
)
from checkpointer.mirror.plan import Mirror, MirrorStatus, lost, plan, retry_after
from checkpointer.policy.policy import Policy
from checkpointer.policy.retention import KeepBest
from checkpointer.ports import Storage
from checkpointer.records.manifest import Manifest
from checkpointer.records.record import Record
from checkpointer.restore.fetch import MirrorSnapshot
from checkpointer.storage.opening import Where, open_storage
from checkpointer.storage.owner import new_owner, release, temporary_owner
from checkpointer.storage.same_place import SamePlaceError, refuse_same, refuse_same_by_trial

T = TypeVar("T")

PROGRESS_S = 5.0
"""Seconds between two lines of progress while `MirrorThread.close` waits."""
LOOK_S = 60.0
"""Seconds that a restore waits for the mirror's listing before it goes on without it."""

_log = logging.getLogger("checkpointer")


def _as_mirror(mirror: Mirror | Where) -> Mirror:
    return mirror if isinstance(mirror, Mirror) else Mirror(mirror)


@attrs.define(eq=False, repr=False)
class MirrorThread:
    """Copies what a directory has on a thread of its own, so that the loop never waits for the mirror's storage.

    Raises:
        StorageError: If the mirror is the directory itself, as far as that shows without a connection.
    """

    _mirror: Mirror = attrs.field(converter=_as_mirror)
    _policy: Policy
    """That of the directory; the thread has one with the mirror's own rules."""
    _source: Storage
    _trust: HMACKey | None
    _copies: bool
    """If False, the mirror is only read."""
    _lease: Lease
    _beat_status: Callable[[], str]
    """Returns what the heartbeats on the mirror say of the training."""
    check: Callable[[], None] = attrs.field(default=lambda: None, init=False)
    """Raises if another process has taken over the run; called before the thread claims it on the mirror."""
    _pid: int = attrs.field(factory=os.getpid, init=False)
    _thread: threading.Thread | None = attrs.field(default=None, init=False)
    # The condition guards these. It is never held during a request to a storage:
    _condition: threading.Condition = attrs.field(factory=threading.Condition, init=False)
    _here: Manifest | None = attrs.field(default=None, init=False)
    _done: Manifest | None = attrs.field(default=None, init=False)
    _announced: dict[str, Record] = attrs.field(factory=dict, init=False)
    _finishing: bool = attrs.field(default=False, init=False)
    _stopped: bool = attrs.field(default=False, init=False)
    # Only the thread writes these; other threads read them:
    _there: Manifest = attrs.field(factory=Manifest, init=False)
    _skipped: frozenset[tuple[str, str]] = attrs.field(default=frozenset(), init=False)
    _error: str = attrs.field(default="", init=False)
    _conflict: ConflictError | None = attrs.field(default=None, init=False)
    # Only the thread uses these:
    _directory: Directory | None = attrs.field(default=None, init=False)
    _owner: str = attrs.field(default="", init=False)
    _logged: set[str] = attrs.field(factory=set, init=False)

    def __attrs_post_init__(self) -> None:
        refuse_same(self._source, self._mirror.where)
        if (keep := self._mirror.keep) is not None:
            ranks = any(isinstance(rule, KeepBest) for rule in keep)
            self._policy = attrs.evolve(self._policy, keep=keep, best=self._policy.best if ranks else None)

    def __str__(self) -> str:
        return without_secrets(str(self._mirror.where))

    def update(self, manifest: Manifest) -> None:
        """Mirror these records from now on. Returns at once.

        Raises:
            ConflictError: If another process trains the run, and writes to the mirror.
        """
        if self._conflict is not None:
            raise self._conflict
        if not self._copies:
            return
        with self._condition:
            if self._stopped or self._finishing:
                return
            self._here = manifest
            if manifest.own:
                self._announced[manifest.own[-1].token] = manifest.own[-1]
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="checkpointer-mirror", daemon=True)
                self._thread.start()
            self._condition.notify_all()

    @property
    def status(self) -> MirrorStatus:
        """How far the copies are. Sends no request to the mirror."""
        return MirrorStatus(behind=tuple(record.name for record in self._missing), error=self._error)

    @property
    def _missing(self) -> tuple[Record, ...]:
        here = self._here
        return plan(self._policy, here, self._there, self._skipped).missing if here is not None else ()

    def close(self, timeout: float) -> None:
        """Wait up to ``timeout`` seconds until all is mirrored; warn about what is not."""
        thread = self._thread
        if os.getpid() != self._pid:
            return  # A forked child has no such thread, and the condition may have been held during the fork.
        with self._condition:
            self._finishing = True
            self._condition.notify_all()
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
            msg = f"the mirror {self} is behind{why}; not mirrored: {names}. The run's next process copies the rest"
            warn(msg)

    def stop(self) -> None:
        """Let the thread end after its current action, even if something is missing."""
        if os.getpid() == self._pid:
            with self._condition:
                self._stopped = True
                self._condition.notify_all()

    # On the thread

    def _run(self) -> None:
        failures = 0
        while self._wait_for_change():
            try:
                self._catch_up()
            except (SamePlaceError, UntrustedError) as error:  # Another try would end in the same way.
                self._failed(error)
                return
            except (RunInUseError, FencedError) as error:
                self._conflict = error
                self._failed(error)
                return
            except Exception as error:  # An error of the mirror does not end the training.
                failures += 1
                self._failed(error)
                self._pause(retry_after(failures, random.random()))
            else:
                failures = 0
        if self._directory is not None:
            # Everything is copied. The next process writes again what close() could not write.
            with contextlib.suppress(Exception):
                self._directory.close()
            release(self._owner)

    def _wait_for_change(self) -> bool:
        """Wait until something is to be mirrored; return False at the end."""
        with self._condition:
            self._condition.wait_for(lambda: self._stopped or self._finishing or self._here is not self._done)
            return not self._stopped and self._here is not self._done

    def _pause(self, seconds: float) -> None:
        """Wait. A new checkpoint does not end the wait, but the end of the training does, once."""
        with self._condition:
            was_finishing = self._finishing
            self._condition.wait_for(lambda: self._stopped or self._finishing != was_finishing, seconds)

    def _failed(self, error: Exception) -> None:
        is_same_place = isinstance(error, SamePlaceError)
        ends = isinstance(error, (SamePlaceError, UntrustedError)) or self._conflict is not None
        self._error = f"{(StorageError if is_same_place else type(error)).__name__}: {error}"
        if self._error not in self._logged:
            self._logged.add(self._error)
            again = "" if ends else "; training goes on, and the mirror tries again"
            _log.warning("mirror %s: %s%s", self, self._error, again)
        # The next try lists the mirror again, as a new owner, so that it may finish what this one left.
        if self._directory is not None:
            self._directory.holder.stop_heartbeat()
        self._directory = None
        release(self._owner)

    def _catch_up(self) -> None:
        """Copy one checkpoint after the other, with a new plan before each; return when nothing is missing."""
        while not self._stopped:
            with self._condition:
                here, announced = self._here, dict(self._announced)
            assert here is not None, "the thread waits for it"
            directory = self._connect(here)
            self._there = directory.manifest
            self._log_lost(here, announced)
            todo = plan(self._policy, here, self._there, self._skipped)
            for record in todo.changed:
                directory.rewrite(record)
            if todo.missing:
                self._copy(todo.missing[0], directory)
            aside = directory.manifest.aside
            directory.looks.before_retiring(spare=todo.kept)
            if directory.manifest.aside is not aside:
                continue  # Something is gone, and is copied again.
            directory.conclude(spare=todo.kept)
            self._there = directory.manifest
            if todo.missing:
                continue
            if directory.journal.unfinished:
                msg = f"{', '.join(directory.journal.unfinished)} could not be deleted"
                raise StorageError(msg)
            if self._error:
                _log.info("mirror %s: caught up", self)
            self._error = ""
            self._logged.clear()
            with self._condition:
                self._done = here
            return

    def _connect(self, here: Manifest) -> Directory:
        if self._directory is None:
            self.check()
            self._owner = new_owner()
            storage = open_storage(self._mirror.where, self._owner, self._mirror.options)
            refuse_same(self._source, storage)
            refuse_same_by_trial(self._source, storage)
            self._directory = Directory(
                storage,
                self._owner,
                self._policy,
                run=here.run,
                label=here.label,
                writes=True,
                trust=self._trust,
                lease=self._lease,
                open_again=lambda: open_storage(self._mirror.where, self._owner, self._mirror.options),
                status=self._beat_status,
            )
        self._directory.hold(here.run)
        self._directory.lines.see(here.run, here.line)
        self._directory.contents.note(here.seen)
        self._directory.begin()
        return self._directory

    def _copy(self, record: Record, directory: Directory) -> None:
        try:
            directory.copy_in(record, self._source, record.name)
        except CorruptError as error:
            # It was retired, replaced, renamed or damaged here. If it was renamed, it is copied under its new name.
            self._skipped |= {(record.token, record.name)}
            _log.warning("mirror %s: %s; it is not mirrored", self, error)

    def _log_lost(self, here: Manifest, announced: Mapping[str, Record]) -> None:
        candidates = [record for record in announced.values() if (record.token, record.name) not in self._skipped]
        names = [record.name for record in lost(self._policy, here, self._there, candidates)]
        if names:
            _log.warning("mirror %s: retired here before they could be mirrored: %s", self, ", ".join(names))
        waiting = {record.token for record in here.own} - {record.token for record in self._there.records}
        with self._condition:
            for token in announced.keys() - waiting:
                del self._announced[token]

    # On the thread of a restore

    def look(self, seconds: float = LOOK_S) -> MirrorSnapshot:
        """Return what the mirror holds. If it does not answer in time, the snapshot has that as a problem."""
        try:
            return _within(seconds, self._look)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            return MirrorSnapshot(problems=(f"what the mirror {self} may hold, which could not be reached ({why})",))

    def _look(self) -> MirrorSnapshot:
        # A storage of its own, because the thread may be using the other one.
        with temporary_owner() as owner:
            storage = open_storage(self._mirror.where, owner, self._mirror.options)
            listing = load(storage, self._trust)
        damaged = (f"on the mirror {problem}" for problem in listing.damaged.values())
        records = {record.token: record for record in _candidates(listing)}
        return MirrorSnapshot(storage=storage, records=records, problems=tuple(damaged))


def _candidates(listing: Listing) -> Iterator[Record]:
    """Yield the records that may have a payload. A fetch proves by digest whether they do."""
    for entry in listing.entries.values():
        if entry.status == "committed":
            yield entry.record
        elif entry.status == "pending":
            found = {entry.record.name, *(name for name in listing.files if name.startswith(entry.record.name + "/"))}
            size = sum(listing.files[name].size for name in found if name in listing.files)
            yield from (record for record in (entry.previous, entry.record) if record and record.size == size)


def _within(seconds: float, call: Callable[[], T]) -> T:
    """Return or raise what ``call`` does; raise `TimeoutError` if it takes longer."""
    answer: Future[T] = Future()

    def work() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=work, name="checkpointer-mirror-look", daemon=True).start()
    if not wait_for([answer], seconds).done:
        msg = f"no answer within {seconds:g} s"
        raise TimeoutError(msg)
    return answer.result()
