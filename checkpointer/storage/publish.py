"""Gives a remote file its name: in one step, and if the name must be new, for only one of several writers."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import attrs

from checkpointer.errors import NameTakenError
from checkpointer.storage.connection import Connection
from checkpointer.storage.driver_differences import (
    as_native_errors,
    copy,
    has_rename_new,
    is_refusal,
    modified_s,
    rename,
    rename_new,
)
from checkpointer.storage.owner import STAGING, is_dead
from checkpointer.storage.reader import read_whole
from checkpointer.storage.retry import is_transient

REPLACING: Final = ".checkpointer/replacing"
"""Folder of a new file while the old one is removed, on servers that cannot replace in one step."""
_ATTEMPTS: Final = 8
_PATIENT_ATTEMPTS: Final = 3
"""So often a writer waits for another one's replacement to end, before it goes first."""
_CLAIM_S: Final = 900.0
"""A claim or a replacement takes a few requests. After so many seconds its writer is considered dead."""


@attrs.frozen
class Capabilities:
    """How a server does what the commit protocol needs."""

    replaces: bool
    """A rename replaces an existing file. If False, it fails. Object stores replace by a PUT."""
    refuses: bool
    """The server refuses the second of two writers of one new name. If False, the writers use claims."""
    copies: bool
    """The server copies. If False, the bytes pass through this process."""


class Publisher:
    """Puts files under their names, on one connection, for one writer."""

    def __init__(self, connection: Connection, owner: str) -> None:
        self._to = connection
        self.staging = f"{STAGING}/{owner or 'unknown'}-{uuid.uuid4().hex[:8]}"
        """Folder of this writer's unfinished files."""
        self._sent: dict[str, str] = {}
        """Source and target of each rename request. It may have been applied although its reply was lost."""
        self._claims: set[str] = set()
        """Claims that are held. Other claims of this writer could not be removed, and have no effect."""

    def new_staged(self) -> str:
        """Return an unused path in the staging folder."""
        return f"{self.staging}/{uuid.uuid4().hex[:12]}"

    # Replace a file

    def put(self, path: str, data: bytes) -> None:
        """Create or replace a small file in one step."""
        if self._to.is_object_store:
            self._to.attempt(f"writing {path}", lambda: self._put(path, data))
        else:
            self.move(self._staged(path, data), path, replace=True)

    def _put(self, path: str, data: bytes) -> None:
        self._to.fs.pipe_file(self._to.full(path), data)

    def _staged(self, path: str, data: bytes) -> str:
        # A new name for each attempt, because a server may still hold the file of a cut connection open.
        return self._to.attempt(f"staging {path}", lambda: self._write(self.new_staged(), data))

    def _write(self, path: str, data: bytes) -> str:
        with self._to.create(path) as stream:
            stream.write(data)
        return path

    def move(self, staged: str, path: str, *, replace: bool) -> None:
        """Give a staged file its name. Without ``replace``, raise `NameTakenError` if the name is taken."""
        if replace:
            self._to.attempt(f"publishing {path}", lambda: self._move_over(staged, path))
            return
        self.refuse_taken(path)
        try:
            self._to.attempt(f"publishing {path}", lambda: self._move_new(staged, path))
        except OSError as error:
            if is_refusal(error) and not isinstance(error, NameTakenError):
                raise self.taken(path) from error
            raise

    def _move_over(self, staged: str, path: str) -> None:
        """Rename over an existing file: in one step, or so that in between `FsspecStorage.open` finds the new file."""
        if self.capabilities.replaces:
            self._rename(staged, path)
            return
        for attempt in range(_ATTEMPTS):
            try:
                self._swap(staged, path, is_patient=attempt < _PATIENT_ATTEMPTS)
            except Exception as error:
                # Another writer is replacing the same file.
                if not (is_refusal(error) or isinstance(error, FileNotFoundError)) or attempt == _ATTEMPTS - 1:
                    raise
                _pause(attempt)
            else:
                return

    def _swap(self, staged: str, path: str, *, is_patient: bool) -> None:
        """Rename in steps. If an earlier attempt lost a reply, continue with the step that is not applied yet.

        The file under ``waiting`` reserves the replacement, because a second writer's rename to it is refused.
        """
        to, waiting = self._to, f"{REPLACING}/{path}"
        if self._sent.get(staged) == waiting and not to.find(staged):
            # If nothing waits, the file has got its name, or another writer has replaced the file after this one.
            if to.find(waiting):
                self._replace_with(waiting, path)
        elif not self._is_moved(staged, path):
            if path not in to.find(path):
                self._rename(staged, path)
                return
            with self._reserve(staged, waiting, is_patient=is_patient):
                self._rename(staged, waiting)
                self._replace_with(waiting, path)

    @contextlib.contextmanager
    def _reserve(self, staged: str, waiting: str, *, is_patient: bool) -> Iterator[None]:
        """Make room for a file that waits, although another writer that stopped has its own file there.

        That writer may continue, and move away the file that it is about to replace. Therefore its own file is put back
        for it. It is removed if its writer is dead.
        """
        other = self._to.find(waiting).get(waiting)
        if other is None:
            yield
        elif _is_stale(other, self._to.find(staged).get(staged, {})):
            self._to.remove(waiting)
            yield
        elif is_patient:
            raise FileExistsError(errno.EEXIST, "another writer is replacing the file", waiting)
        else:
            theirs = self.new_staged()
            self._rename(waiting, theirs)
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    self._put_back(theirs, waiting)

    def _replace_with(self, waiting: str, path: str) -> None:
        to, old = self._to, self.new_staged()
        if path in to.find(path):
            self._rename(path, old)
        with contextlib.suppress(FileNotFoundError):
            self._rename(waiting, path)
        if not to.find(path) and not to.find(waiting):
            # Another writer has replaced the file after this one, and its file is the one that was moved away.
            self._put_back(old, path)
        # If a reader holds the old file open, it is swept later.
        with contextlib.suppress(OSError):
            to.remove(old)

    def _put_back(self, moved: str, path: str) -> None:
        """Give a file its name again, unless another file has it meanwhile."""
        try:
            self._to.attempt(f"restoring {path}", lambda: self._rename(moved, path))
        except OSError as error:
            if not is_refusal(error) and not isinstance(error, FileNotFoundError):
                raise

    def _move_new(self, staged: str, path: str) -> None:
        if self._is_moved(staged, path):
            return
        # An object store renames by a copy, which replaces.
        is_refused = self.capabilities.refuses and not self._to.is_object_store
        with contextlib.nullcontext() if is_refused else self._claim(path):
            self._rename(staged, path, is_new=True)

    def _is_moved(self, source: str, target: str) -> bool:
        """Return whether an earlier request has moved the file, and only its reply was lost."""
        return self._sent.get(source) == target and not self._to.find(source) and bool(self._to.find(target))

    def _rename(self, source: str, target: str, *, is_new: bool = False) -> None:
        """Rename a file, or let an object store copy it. A second call for the same file succeeds too.

        ``is_new`` refuses a target that exists, if the server can.
        """
        to = self._to
        apply = rename_new if is_new and self.capabilities.refuses and has_rename_new(to.fs) else rename
        # Other writers use the other paths too.
        is_own = source.startswith(f"{STAGING}/")
        is_again = is_own and self._sent.get(source) == target
        if is_own:
            self._sent[source] = target
        try:
            to.make_parents(target)
            with as_native_errors():
                if to.is_object_store:
                    copy(to.fs, to.full(source), to.full(target))
                    to.fs.rm_file(to.full(source))
                else:
                    apply(to.fs, to.full(source), to.full(target))
        except FileNotFoundError:
            if to.find(source) and not is_again:
                # Another writer has removed the target's folder, because it was empty.
                to.forget_folders()
                self._rename(source, target, is_new=is_new)
                return
            # The reply to an earlier attempt may be lost. Only this writer knows the staged name, so it moved the file.
            if not is_again or to.find(source) or not to.find(target):
                raise
        # WebHDFS does not report a refused rename, and moves a file into a folder that has the target's name.
        if to.is_object_store:
            return
        found = to.find(target)
        if (is_own and to.find(source)) or (target not in found and (is_own or found)):
            raise FileExistsError(errno.EEXIST, "the server did not rename", target)

    # Create a new file: of two writers, one wins

    def create(self, path: str, data: bytes) -> None:
        """Write a small file under a new name; raise `NameTakenError` if it exists, or another writer creates it."""
        if not self._to.is_object_store:
            self.move(self._staged(path, data), path, replace=False)
            return
        self.refuse_taken(path)
        create = self._create_exclusively if self.capabilities.refuses else self._create_claimed
        try:
            self._to.attempt(f"creating {path}", lambda: create(path, data))
        except OSError as error:
            if not is_refusal(error):
                raise
            # If the reply was lost, the retry of our own write is refused.
            if self._holds(path, data):
                return
            self.refuse_taken(path)
            # SeaweedFS refuses the name of a former folder, although nothing is there. Then the claims decide.
            self._to.attempt(f"creating {path}", lambda: self._create_claimed(path, data))

    def _create_exclusively(self, path: str, data: bytes) -> None:
        self._to.fs.pipe_file(self._to.full(path), data, mode="create")

    def _create_claimed(self, path: str, data: bytes) -> None:
        with self._claim(path):
            self._put(path, data)
            if not self._holds(path, data):
                raise self.taken(path)

    @contextlib.contextmanager
    def _claim(self, path: str) -> Iterator[None]:
        """Reserve a new name, on a server that would accept two writers: write a claim, then look for other claims.

        A writer that sees another claim withdraws its own, so at most one continues. If both withdraw, they try again.
        """
        key = f"/claim-{hashlib.sha256(path.encode()).hexdigest()[:32]}-"
        mine = f"{self.staging}{key}{uuid.uuid4().hex[:12]}"
        for attempt in range(_ATTEMPTS):
            self._claims.add(mine)
            try:
                self._write(mine, b"claimed")
                found = self._to.find(STAGING)
                if not any(key in other and other != mine and self._is_held(other, found, mine) for other in found):
                    if self._to.find(path):
                        raise self.taken(path)
                    yield
                    return
            finally:
                self._claims.discard(mine)
                with contextlib.suppress(OSError):
                    self._to.remove(mine)
            _pause(attempt)
        raise self.taken(path)

    def _is_held(self, claim: str, found: Mapping[str, Mapping[str, Any]], mine: str) -> bool:
        if claim.startswith(f"{self.staging}/"):
            return claim in self._claims
        # By the server's clock only. A claim of a machine that was preempted must not block the next writer.
        return not _is_stale(found[claim], found.get(mine, {})) and not is_dead(owner_of(claim))

    def _holds(self, path: str, data: bytes) -> bool:
        try:
            return read_whole(lambda: self._to.open(path), len(data) + 1) == data
        except FileNotFoundError:
            return False

    def refuse_taken(self, path: str) -> None:
        """Raise `NameTakenError` if a file or folder has this name."""
        if self._to.find(path) or (not self.capabilities.replaces and self._to.find(f"{REPLACING}/{path}")):
            raise self.taken(path)

    def taken(self, path: str) -> NameTakenError:
        """Return the error of a taken name."""
        msg = f"{path} appeared in {self._to} while it was about to be written; nothing was replaced"
        return NameTakenError(msg)

    def copy(self, source: str, path: str) -> None:
        """Let the server copy a file, and replace an existing one in one step."""
        self._to.attempt(f"copying {source} to {path}", lambda: self._copy(source, path))

    def _copy(self, source: str, target: str) -> None:
        copied = target if self._to.is_object_store else self.new_staged()
        self._to.make_parents(copied)
        copy(self._to.fs, self._to.full(source), self._to.full(copied))
        if copied != target:
            self._move_over(copied, target)

    @functools.cached_property
    def capabilities(self) -> Capabilities:
        """What the server can do. It is tried out at first use, because servers and drivers claim more than they do."""
        return self._to.attempt("probing", self._probe)

    def _probe(self) -> Capabilities:
        # New names for each attempt, because files of an earlier attempt would change the result.
        first, second, third = (f"{self.staging}/probe-{uuid.uuid4().hex[:8]}-{number}" for number in (1, 2, 3))
        try:
            if self._to.is_object_store:
                return Capabilities(replaces=True, refuses=self._probe_create(first), copies=True)
            replaces = self._probe_rename(first, second)
            refuses = not replaces or self._probe_rename_new(first, second)
            return Capabilities(replaces=replaces, refuses=refuses, copies=self._probe_copy(second, third))
        finally:
            for path in (first, second, third):
                with contextlib.suppress(OSError):
                    self._to.remove(path)

    def _probe_create(self, path: str) -> bool:
        outcomes = [_succeeds(self._create_exclusively, path, data) for data in (b"1", b"2")]
        return outcomes == [True, False] and self._holds(path, b"1")

    def _probe_rename(self, source: str, target: str) -> bool:
        self._write(source, b"new")
        self._write(target, b"old")
        # Some servers ignore the request, and report success.
        return _succeeds(rename, self._to.fs, self._to.full(source), self._to.full(target)) and self._holds(
            target, b"new"
        )

    def _probe_rename_new(self, source: str, target: str) -> bool:
        """Return whether the server refuses a rename to the name of ``target``, which holds what is new."""
        fs = self._to.fs
        if not has_rename_new(fs):
            return False
        self._write(source, b"newer")
        return not _succeeds(rename_new, fs, self._to.full(source), self._to.full(target)) and self._holds(
            target, b"new"
        )

    def _probe_copy(self, source: str, target: str) -> bool:
        # These drivers have a method for it that reads the file and writes it again.
        if self._to.protocol in ("webhdfs", "hdfs", "ftp"):
            return False
        return _succeeds(copy, self._to.fs, self._to.full(source), self._to.full(target))


def _succeeds(request: Callable[..., object], *args: Any) -> bool:
    """Return whether the server applies a request. Any error but a transient one means that it cannot."""
    try:
        request(*args)
    except Exception as error:
        if is_transient(error):
            raise
        return False
    return True


def _is_stale(info: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Return whether a file is so much older than a new one that its writer is considered dead."""
    then, now = modified_s(info), modified_s(new)
    return now is not None and then is not None and now - then > _CLAIM_S


def _pause(attempt: int) -> None:
    time.sleep(0.01 * 2**attempt * (1 + random.random() * 8))


def owner_of(path: str) -> str:
    """Return the owner of the staging folder that the path is in."""
    return path[len(STAGING) + 1 :].partition("/")[0].rpartition("-")[0]
