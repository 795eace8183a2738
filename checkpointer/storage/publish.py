"""How a remote file gets its name: in one step, and if it must be new, for one of several writers only."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import random
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal

import attrs

from checkpointer.errors import NameTakenError
from checkpointer.storage.connection import Connection
from checkpointer.storage.drivers import as_native_errors, copy, is_refusal, modified_s, rename
from checkpointer.storage.owner import is_dead
from checkpointer.storage.reread import read_whole
from checkpointer.storage.retry import is_transient

__all__ = ["REPLACING", "STAGING", "Capabilities", "Publisher", "owner_of"]

STAGING: Final = ".checkpointer/staging"
REPLACING: Final = ".checkpointer/replacing"
"""Where a new file waits while the old one is removed, on servers that cannot replace in one step."""
_CLAIM_ATTEMPTS: Final = 8
_CLAIM_S: Final = 900.0
"""A claim is held for a few requests: after so many seconds nobody holds it any more."""


@attrs.frozen
class Capabilities:
    """How a storage does what the commit protocol needs."""

    rename: Literal["replaces", "refuses", "none"]
    """What a rename onto an existing file does."""
    create: Literal["refuses", "claims"]
    """How two writers of one new name are told apart: the server refuses the second, or they announce themselves."""
    copy: Literal["server", "client"]
    """Whether the server copies, or the bytes pass through this process."""

    def describe(self) -> Mapping[str, str]:
        """Return them in words."""
        replace = {
            "replaces": "rename",
            "refuses": "two renames that readers see through",
            "none": "PUT",
        }
        create = {"refuses": "refused by the server", "claims": "by claims (the server would overwrite)"}
        copy = {"server": "on the server", "client": "through this process"}
        return {"replace": replace[self.rename], "create": create[self.create], "copy": copy[self.copy]}


class Publisher:
    """Puts files under their names, on one connection, for one writer.

    Args:
        connection: Where to.
        owner: Id of the writer.
    """

    def __init__(self, connection: Connection, owner: str) -> None:
        self._to = connection
        self.staging = f"{STAGING}/{owner or 'nobody'}-{uuid.uuid4().hex[:8]}"
        """Folder of this writer's unfinished files."""
        self._sent: dict[str, str] = {}
        """Where a file may be by now, whatever became of the reply: what each rename was to move, and to where."""
        self._claims: set[str] = set()
        """Claims that are held; others of this writer could not be removed, and mean nothing."""

    def new_staged(self) -> str:
        """Return an unused path in the staging folder."""
        staged = f"{self.staging}/{uuid.uuid4().hex[:12]}"
        self._to.make_parents(staged)
        return staged

    # Over what is there

    def put(self, path: str, data: bytes) -> None:
        """Create or replace a small file in one step."""
        self._to.attempt(f"writing {path}", lambda: self._put(path, data))

    def _put(self, path: str, data: bytes) -> None:
        if self._to.is_object_store:
            self._to.fs.pipe_file(self._to.full(path), data)
        else:
            self._move_over(self._stage(data), path)

    def _stage(self, data: bytes) -> str:
        staged = self.new_staged()
        with self._to.fs.open(self._to.full(staged), "wb") as stream:
            stream.write(data)
        return staged

    def move(self, staged: str, path: str, *, replace: bool) -> None:
        """Give a staged file its name; without ``replace`` raise `NameTakenError` if there is one of that name."""
        if replace:
            self._to.attempt(f"publishing {path}", lambda: self._move_over(staged, path))
            return
        if self.is_taken(path):
            raise self.taken(path)
        try:
            self._to.attempt(f"publishing {path}", lambda: self._move_new(staged, path))
        except OSError as error:
            if is_refusal(error) and not isinstance(error, NameTakenError):
                raise self.taken(path) from error
            raise

    def _move_over(self, staged: str, path: str) -> None:
        """Rename over what is there: in one step, or so that in between `FsspecStorage.open` finds the new one."""
        if self.capabilities.rename != "refuses":
            self._rename(staged, path)
            return
        for attempt in range(_CLAIM_ATTEMPTS):
            try:
                self._swap(staged, path)
            except Exception as error:
                # Another writer puts the same file there at this moment.
                if not (is_refusal(error) or isinstance(error, FileNotFoundError)) or attempt == _CLAIM_ATTEMPTS - 1:
                    raise
                _pause(attempt)
            else:
                return

    def _swap(self, staged: str, path: str) -> None:
        """Rename in steps; begun again after a lost reply, go on from where the file is."""
        waiting, to = f"{REPLACING}/{path}", self._to
        is_waiting = self._sent.get(staged) == waiting and not to.find(staged)
        if not is_waiting and (self._is_moved(staged, path) or path not in to.find(path)):
            if not self._is_moved(staged, path):
                self._rename(staged, path)
            to.remove(waiting)
            return
        if not is_waiting:
            to.remove(waiting)
            self._rename(staged, waiting)
        if not self._is_moved(waiting, path):
            self._replace_with(waiting, path)
        self._sent.pop(waiting, None)

    def _replace_with(self, waiting: str, path: str) -> None:
        old = self.new_staged()
        if path in self._to.find(path):
            self._rename(path, old)
        self._rename(waiting, path)
        # Somebody may still be reading it: then it is swept later.
        with contextlib.suppress(OSError):
            self._to.remove(old)

    def _move_new(self, staged: str, path: str) -> None:
        if self._is_moved(staged, path):
            return
        if self.capabilities.rename == "refuses":
            self._rename(staged, path)
            return
        with self._claim(path):
            self._rename(staged, path)

    def _is_moved(self, source: str, target: str) -> bool:
        """Return whether an earlier attempt has done it, and only its reply was lost."""
        return self._sent.get(source) == target and not self._to.find(source) and bool(self._to.find(target))

    def _rename(self, source: str, target: str) -> None:
        """Rename a file, or let the server copy it where there is no rename. Done twice, it succeeds twice."""
        to = self._to
        is_again = self._sent.get(source) == target
        self._sent[source] = target
        try:
            to.make_parents(target)
            with as_native_errors():
                if to.is_object_store:
                    copy(to.fs, to.full(source), to.full(target))
                    to.fs.rm_file(to.full(source))
                else:
                    rename(to.fs, to.full(source), to.full(target))
        except FileNotFoundError:
            if to.find(source) and not is_again:
                # Another writer has removed the folder, which was empty.
                to.forget_folders()
                self._rename(source, target)
                return
            # If the reply to an earlier attempt was lost: nobody else knows the staged name, so it was moved by us.
            if not is_again or to.find(source) or not to.find(target):
                raise
        # WebHDFS says nothing at all when it refuses, and moves a file into a folder that has its name.
        if not to.is_object_store and (to.find(source) or target not in to.find(target)):
            raise FileExistsError(errno.EEXIST, "the server did not rename", target)

    # Where nothing is yet: of two writers, one wins

    def create(self, path: str, data: bytes) -> None:
        """Write a small file that must not be there yet; raise `NameTakenError` if it is, or another is about to."""
        if self.is_taken(path):
            raise self.taken(path)
        try:
            self._to.attempt(f"creating {path}", lambda: self._create(path, data))
        except OSError as error:
            if not is_refusal(error):
                raise
            # A lost reply makes the retry of our own write look like somebody else's.
            if self._holds(path, data):
                return
            if self.is_taken(path):
                raise self.taken(path) from error
            # SeaweedFS refuses a name that was a folder once. Nothing is there: the claims decide.
            self._to.attempt(f"creating {path}", lambda: self._create_claimed(path, data))

    def _create(self, path: str, data: bytes) -> None:
        if not self._to.is_object_store:
            self._move_new(self._stage(data), path)
        elif self.capabilities.create == "refuses":
            self._create_exclusively(path, data)
        else:
            self._create_claimed(path, data)

    def _create_exclusively(self, path: str, data: bytes) -> None:
        self._to.fs.pipe_file(self._to.full(path), data, mode="create")

    def _create_claimed(self, path: str, data: bytes) -> None:
        with self._claim(path):
            self._put(path, data)
            if not self._holds(path, data):
                raise self.taken(path)

    @contextlib.contextmanager
    def _claim(self, path: str) -> Iterator[None]:
        """Keep others from creating ``path``, on a server that would let both: say so, then look who else does.

        Whoever sees another claim steps back, so at most one goes on; that both step back is rare, and tried again.
        """
        key = f"/claim-{hashlib.sha256(path.encode()).hexdigest()[:32]}-"
        mine = f"{self.staging}{key}{uuid.uuid4().hex[:12]}"
        for attempt in range(_CLAIM_ATTEMPTS):
            self._claims.add(mine)
            try:
                self._to.make_parents(mine)
                with self._to.fs.open(self._to.full(mine), "wb") as stream:
                    stream.write(b"claimed")
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
        # By the server's clock alone: what a machine that was taken away has claimed must not block the next one.
        now, then = modified_s(found.get(mine, {})), modified_s(found[claim])
        is_stale = now is not None and then is not None and now - then > _CLAIM_S
        return not is_stale and not is_dead(owner_of(claim))

    def _holds(self, path: str, data: bytes) -> bool:
        try:
            return read_whole(lambda: self._to.open(path), len(data) + 1) == data
        except FileNotFoundError:
            return False

    def is_taken(self, path: str) -> bool:
        """Return whether there is a file or folder of this name."""
        is_there = bool(self._to.find(path))
        if is_there or self._to.is_object_store or self.capabilities.rename != "refuses":
            return is_there
        return bool(self._to.find(f"{REPLACING}/{path}"))

    def taken(self, path: str) -> NameTakenError:
        """Return the error that says so."""
        msg = f"{path} appeared in {self._to} while it was about to be written; nothing was replaced"
        return NameTakenError(msg)

    # Copies

    def copy(self, source: str, path: str) -> None:
        """Let the server copy a file, in one step over what is there."""
        self._to.attempt(f"copying {source} to {path}", lambda: self._copy(source, path))

    def _copy(self, source: str, target: str) -> None:
        if self._to.is_object_store:
            copy(self._to.fs, self._to.full(source), self._to.full(target))
            return
        staged = self.new_staged()
        copy(self._to.fs, self._to.full(source), self._to.full(staged))
        self._move_over(staged, target)

    # What the server can do

    @functools.cached_property
    def capabilities(self) -> Capabilities:
        """What the server can do, found out at first use: what servers and drivers say is not believed."""
        return self._to.attempt("probing", self._probe)

    def _probe(self) -> Capabilities:
        # New names each time: what an earlier attempt has left would be an answer of its own.
        first, second, third = (f"{self.staging}/probe-{uuid.uuid4().hex[:8]}-{number}" for number in (1, 2, 3))
        self._to.make_parents(first)
        try:
            if self._to.is_object_store:
                return Capabilities("none", self._probe_create(first), "server")
            onto = self._probe_rename(first, second)
            create: Literal["refuses", "claims"] = "refuses" if onto == "refuses" else "claims"
            return Capabilities(onto, create, self._probe_copy(second, third))
        finally:
            for path in (first, second, third):
                with contextlib.suppress(OSError):
                    self._to.remove(path)

    def _probe_create(self, path: str) -> Literal["refuses", "claims"]:
        outcomes = []
        for data in (b"1", b"2"):
            try:
                self._create_exclusively(path, data)
            except Exception as error:  # Whatever it is: this driver does not offer it, or the server refuses.
                _raise_if_unknown(error)
                outcomes.append("refused")
            else:
                outcomes.append("created")
        return "refuses" if outcomes == ["created", "refused"] and self._holds(path, b"1") else "claims"

    def _probe_rename(self, source: str, target: str) -> Literal["replaces", "refuses"]:
        fs, full = self._to.fs, self._to.full
        for path, data in ((source, b"new"), (target, b"old")):
            with fs.open(full(path), "wb") as stream:
                stream.write(data)
        try:
            rename(fs, full(source), full(target))
        except Exception as error:  # Whatever it is, it was not done.
            _raise_if_unknown(error)
            return "refuses"
        # Some do nothing, and say nothing.
        return "replaces" if self._holds(target, b"new") else "refuses"

    def _probe_copy(self, source: str, target: str) -> Literal["server", "client"]:
        # These read the file and write it again, behind a method of that name.
        if self._to.protocol in ("webhdfs", "hdfs", "ftp"):
            return "client"
        try:
            copy(self._to.fs, self._to.full(source), self._to.full(target))
        except Exception as error:  # Whatever it is, this driver does not offer it.
            _raise_if_unknown(error)
            return "client"
        return "server"


def _pause(attempt: int) -> None:
    time.sleep(0.01 * 2**attempt * (1 + random.random() * 8))


def _raise_if_unknown(error: Exception) -> None:
    """Raise what says nothing of the server: a lost reply is no refusal."""
    if is_transient(error):
        raise error


def owner_of(path: str) -> str:
    """Return whose staging folder the path is in."""
    return path[len(STAGING) + 1 :].partition("/")[0].rpartition("-")[0]
