"""A storage whose process dies at a chosen operation, so that a test can try every one of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, Final, Literal, NoReturn, Protocol, TypeVar, cast, get_args

from checkpointer.ports import (
    Stat,
    Storage,
    SupportsCapabilities,
    SupportsCopy,
    SupportsFreeSpace,
    SupportsLinks,
    SupportsPaths,
    SupportsSweep,
    Upload,
)
from checkpointer.storage.owner import release

__all__ = ["Crash", "CrashingStorage", "die"]

T = TypeVar("T")
When = Literal["before", "halfway", "after"]

_OPTIONAL: Final[Mapping[type, tuple[str, ...]]] = {
    SupportsLinks: ("symlink", "hardlink"),
    SupportsCopy: ("copy",),
    SupportsFreeSpace: ("free_space",),
    SupportsPaths: ("local_path", "stage", "sync"),
    SupportsSweep: ("prepare", "sweep", "close"),
    SupportsCapabilities: ("capabilities",),
}


class Crash(BaseException):
    """The simulated death of the process. No ``except Exception`` survives it, just as none survives ``kill -9``.

    Example:
        >>> from checkpointer.testing import Crash, CrashingStorage, MemoryStorage
        >>> storage = CrashingStorage(MemoryStorage(), at=1, when="before")
        >>> try:
        ...     storage.write("a", b"1")
        ... except Crash as crash:
        ...     print(crash)
        operation 1 (write), before
    """


def die(owner: str) -> None:
    """Say that the process that owned this is dead, so that others may clear up after it.

    A simulated crash leaves the real process running, and with it every owner id that it made: without this, the
    next manager rightly takes the crashed one for alive. It is `checkpointer.storage.owner.release`.

    Args:
        owner: The id, from `checkpointer.storage.owner.new_owner`.

    Example:
        >>> from checkpointer.storage.owner import is_dead, new_owner
        >>> from checkpointer.testing import die
        >>> owner = new_owner()
        >>> die(owner)
        >>> is_dead(owner)
        True
    """
    release(owner)


class _Everything(
    Storage,
    SupportsLinks,
    SupportsCopy,
    SupportsFreeSpace,
    SupportsPaths,
    SupportsSweep,
    SupportsCapabilities,
    Protocol,
):
    """What the storage inside may support."""


class CrashingStorage:
    """Another storage, until the process dies at its n-th operation.

    It supports what ``inner`` supports, no more and no less, by `isinstance` with the ports. These count as one
    operation each: ``list``, ``open``, ``write``, ``delete``, ``symlink``, ``hardlink``, ``copy``, ``sync``,
    ``prepare``, ``sweep``, beginning an upload (``upload`` or ``stage``), and the upload's ``write``, ``finish`` and
    ``publish``. Once dead, every method raises `Crash`, ``abort`` and ``close`` included: the dead clear nothing up.
    Only the files that it held open are closed, as the kernel does: what was staged stays, unpublished.

    Args:
        inner: Where the files really are. Look at it, or open a new storage on it, to see what the crash left.
        at: The operation to die at, from 1; 0 never dies.
        when: ``"before"`` the effect; ``"halfway"``: an upload's ``write`` has written half of the data, a folder that
            is deleted or copied has lost or got half of its files, and what the contract calls one step is done;
            ``"after"`` the effect, before the caller knows.

    Raises:
        ValueError: If ``at`` is negative, or ``when`` is none of these.

    Example:
        >>> from checkpointer.testing import Crash, CrashingStorage, MemoryStorage
        >>> disk = MemoryStorage()
        >>> storage = CrashingStorage(disk, at=2, when="after")
        >>> try:
        ...     for name in ("a", "b", "c"):
        ...         storage.write(name, b"data")
        ... except Crash:
        ...     print(sorted(disk.list()), storage.operations)
        ['a', 'b'] 2
    """

    def __init__(self, inner: Storage, at: int = 0, when: When = "before") -> None:
        if at < 0 or when not in get_args(When):
            msg = f"at={at!r}, when={when!r}; expected at >= 0 (0 never dies) and when one of {get_args(When)}"
            raise ValueError(msg)
        self.operations = 0
        """How many there were so far. Run once with ``at=0`` to learn how many there are to die at."""
        self.is_dead = False
        self._inner = cast(_Everything, inner)
        self._at = at
        self._when = when
        self._unfinished: list[Upload] = []
        # In the instance, for since Python 3.12 isinstance() with a Protocol does not ask __getattr__.
        for port, names in _OPTIONAL.items():
            if isinstance(inner, port):
                vars(self).update({name: getattr(self, f"_{name}") for name in names})

    def __str__(self) -> str:
        return str(self._inner)

    # Storage

    def list(self, prefix: str = "") -> Mapping[str, Stat]:
        """See `Storage.list`."""
        return self._do("list", lambda: self._inner.list(prefix))

    def open(self, path: str) -> BinaryIO:
        """See `Storage.open`."""
        return self._do("open", lambda: self._inner.open(path), last=_nothing)

    def write(self, path: str, data: bytes) -> None:
        """See `Storage.write`."""
        self._do("write", lambda: self._inner.write(path, data))

    def delete(self, path: str) -> None:
        """See `Storage.delete`."""
        self._do("delete", lambda: self._inner.delete(path), half=lambda: self._delete_half(path))

    def upload(self, path: str) -> Upload:
        """See `Storage.upload`."""

        def begin() -> Upload:
            upload = self._inner.upload(path)
            self._unfinished.append(upload)
            return upload

        return _CrashingUpload(self, self._do("upload", begin))

    def _delete_half(self, path: str) -> None:
        names = sorted(self._inner.list(path))
        for name in names[: _half(len(names))]:
            self._inner.delete(name)

    # SupportsLinks

    def _symlink(self, target: str, path: str) -> None:
        self._do("symlink", lambda: self._inner.symlink(target, path))

    def _hardlink(self, target: str, path: str) -> None:
        self._do("hardlink", lambda: self._inner.hardlink(target, path))

    # SupportsCopy

    def _copy(self, source: str, path: str) -> None:
        self._do("copy", lambda: self._inner.copy(source, path), half=lambda: self._copy_half(source, path))

    def _copy_half(self, source: str, path: str) -> None:
        names = sorted(self._inner.list(source))
        if names != [source]:
            self._inner.delete(path)
        for name in names[: _half(len(names))]:
            self._inner.copy(name, path + name[len(source) :])

    # SupportsFreeSpace

    def _free_space(self) -> int | None:
        self.check_alive()
        return self._inner.free_space()

    # SupportsPaths

    def _local_path(self, path: str) -> str:
        self.check_alive()
        return self._inner.local_path(path)

    def _stage(self, path: str) -> tuple[str, Upload]:
        staged, upload = self._do("stage", lambda: self._inner.stage(path))
        return staged, _CrashingUpload(self, upload)

    def _sync(self, path: str) -> None:
        self._do("sync", lambda: self._inner.sync(path))

    # SupportsSweep

    def _prepare(self) -> None:
        self._do("prepare", self._inner.prepare)

    def _sweep(self) -> int:
        return self._do("sweep", self._inner.sweep)

    def _close(self) -> None:
        self.check_alive()
        self._inner.close()

    # SupportsCapabilities

    def _capabilities(self) -> Mapping[str, str]:
        self.check_alive()
        return self._inner.capabilities()

    # Death

    def check_alive(self) -> None:
        """Raise `Crash` again if the process has died.

        Raises:
            Crash: If it is dead.

        Example:
            >>> from checkpointer.testing import CrashingStorage, MemoryStorage
            >>> CrashingStorage(MemoryStorage(), at=1).check_alive()
        """
        if self.is_dead:
            msg = f"dead since operation {self._at}"
            raise Crash(msg)

    def _do(
        self,
        what: str,
        effect: Callable[[], T],
        *,
        half: Callable[[], object] | None = None,
        last: Callable[[], object] | None = None,
    ) -> T:
        """Do it and count it, or die: with ``half`` of it done, or all of it (``last`` instead, where given)."""
        self.check_alive()
        self.operations += 1
        if self.operations != self._at:
            return effect()
        if self._when != "before":
            whole = last or effect
            # An operation that failed had no effect, and the dead report no error.
            with contextlib.suppress(Exception):
                (half or whole)() if self._when == "halfway" else whole()
        self._die(what)

    def _die(self, what: str) -> NoReturn:
        self.is_dead = True
        for upload in self._unfinished:
            # Closes its file; it stays invisible.
            with contextlib.suppress(Exception):
                upload.finish()
        msg = f"operation {self.operations} ({what}), {self._when}"
        raise Crash(msg)

    def _forget(self, upload: Upload) -> None:
        self._unfinished = [other for other in self._unfinished if other is not upload]


class _CrashingUpload:
    def __init__(self, storage: CrashingStorage, inner: Upload) -> None:
        self._storage = storage
        self._inner = inner

    def write(self, data: Any) -> int:
        return self._storage._do(
            "upload.write", lambda: self._inner.write(data), half=lambda: self._inner.write(_first_half(data))
        )

    def finish(self) -> None:
        self._storage._do("finish", self._inner.finish)
        self._storage._forget(self._inner)

    def publish(self, *, replace: bool) -> None:
        self._storage._do("publish", lambda: self._inner.publish(replace=replace))

    def abort(self) -> None:
        self._storage.check_alive()
        self._storage._forget(self._inner)
        self._inner.abort()


def _first_half(data: Any) -> memoryview:
    view = memoryview(data).cast("B")
    return view[: len(view) // 2]


def _half(count: int) -> int:
    return (count + 1) // 2


def _nothing() -> None:
    pass
