"""A storage whose process dies at a chosen operation, so that a test can try every operation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, BinaryIO, Final, Literal, NoReturn, TypeVar, cast, get_args

from checkpointer import ports
from checkpointer.ports import Stat, Storage, Upload
from checkpointer.storage.owner import release

T = TypeVar("T")
When = Literal["before", "halfway", "after"]

_OPTIONAL: Final = (
    ports.SupportsLinks,
    ports.SupportsCopy,
    ports.SupportsFreeSpace,
    ports.SupportsPaths,
    ports.SupportsScratch,
    ports.SupportsSweep,
    ports.SupportsCapabilities,
    ports.SupportsURLs,
    ports.SupportsUploads,
)
_UNCOUNTED: Final = {"free_space", "local_path", "url", "close", "capabilities"}


class Crash(BaseException):
    """The simulated death of the process. It is not an `Exception`, so ``except Exception`` does not catch it."""


def die(owner: str) -> None:
    """Mark the owner's process as dead, so that other writers may remove its unfinished writes.

    After a simulated crash the real process goes on, and its owner ids count as alive. Without this call, the next
    manager would take the crashed one for alive. It is `checkpointer.storage.owner.release`.

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


class CrashingStorage:
    """Another storage, until the process dies at its n-th operation.

    By `isinstance` it supports the same ports as ``inner``. These count as one operation each: ``list``, ``open``,
    ``write``, ``write_scratch``, ``delete``, ``delete_scratch``, ``symlink``, ``hardlink``, ``copy``, ``sync``,
    ``prepare``, ``sweep``, ``abort_uploads``, the begin of an upload (``upload`` or ``stage``), and the upload's
    ``write``, ``finish`` and ``publish``. After the death every method raises `Crash`, ``abort`` and ``close``
    included, because a dead process
    does not clean up. Only its open files are closed, as the kernel does. Staged files stay, unpublished.

    Args:
        inner: The real storage. Look at it, or open a new storage on it, to see the files after the crash.
        at: The operation to die at, from 1; 0 never dies.
        when: ``"before"`` the effect; ``"halfway"``: an upload's ``write`` has written half of the data, a deleted or
            copied folder has lost or got half of its files, and an operation that is one step is done; ``"after"``
            the effect, before the call returns.

    Raises:
        ValueError: If ``at`` is negative, or ``when`` is not one of these.

    Example:
        >>> from checkpointer.testing import Crash, CrashingStorage, MemoryStorage
        >>> disk = MemoryStorage()
        >>> storage = CrashingStorage(disk, at=2, when="after")
        >>> try:
        ...     for name in ("a", "b", "c"):
        ...         storage.write(name, b"data")
        ... except Crash as crash:
        ...     print(f"{crash}: {sorted(disk.list())}")
        operation 2 (write), after: ['a', 'b']
    """

    def __init__(self, inner: Storage, at: int = 0, when: When = "before") -> None:
        if at < 0 or when not in get_args(When):
            msg = f"at={at!r}, when={when!r}; expected at >= 0 (0 never dies) and when one of {get_args(When)}"
            raise ValueError(msg)
        self.operations = 0
        """Number of operations so far. Run once with ``at=0`` to learn how many there are."""
        self.is_dead = False
        self._inner: Any = inner
        self._at = at
        self._when = when
        self._unfinished: list[Upload] = []
        # Set on the instance, because since Python 3.12 isinstance() with a Protocol does not call __getattr__.
        for port in _OPTIONAL:
            if isinstance(inner, port):
                names = [name for name in vars(port) if not name.startswith("_")]
                vars(self).update({name: getattr(self, f"_{name}", None) or self._forwarding(name) for name in names})

    def __str__(self) -> str:
        return str(self._inner)

    def list(self, prefix: str = "") -> Mapping[str, Stat]:
        """See `Storage.list`."""
        return cast(Mapping[str, Stat], self._do("list", lambda: self._inner.list(prefix)))

    def open(self, path: str) -> BinaryIO:
        """See `Storage.open`."""
        # If the process dies here, no file stays open.
        return cast(BinaryIO, self._do("open", lambda: self._inner.open(path), last=int))

    def write(self, path: str, data: bytes) -> None:
        """See `Storage.write`."""
        self._do("write", lambda: self._inner.write(path, data))

    def delete(self, path: str) -> None:
        """See `Storage.delete`."""
        self._do("delete", lambda: self._inner.delete(path), half=lambda: self._delete_half(path))

    def upload(self, path: str) -> Upload:
        """See `Storage.upload`."""

        def begin() -> Upload:
            upload: Upload = self._inner.upload(path)
            self._unfinished.append(upload)
            return upload

        return _CrashingUpload(self, self._do("upload", begin))

    def _delete_half(self, path: str) -> None:
        for name in _half(self._inner.list(path)):
            self._inner.delete(name)

    def _forwarding(self, name: str) -> Callable[..., Any]:
        method = getattr(self._inner, name)

        def forward(*args: Any) -> Any:
            if name in _UNCOUNTED:
                self.check_alive()
                return method(*args)
            return self._do(name, lambda: method(*args))

        return forward

    def _copy(self, source: str, path: str) -> None:
        self._do("copy", lambda: self._inner.copy(source, path), half=lambda: self._copy_half(source, path))

    def _copy_half(self, source: str, path: str) -> None:
        names = self._inner.list(source)
        if [*names] != [source]:
            self._inner.delete(path)
        for name in _half(names):
            self._inner.copy(name, path + name[len(source) :])

    def _stage(self, path: str) -> tuple[str, Upload]:
        staged, upload = self._do("stage", lambda: self._inner.stage(path))
        return staged, _CrashingUpload(self, upload)

    def check_alive(self) -> None:
        """Raise `Crash` again if the process has died."""
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
        """Apply the effect and count it, or die: after ``half`` of it, or after all of it (``last`` in its place)."""
        self.check_alive()
        self.operations += 1
        if self.operations != self._at:
            return effect()
        if self._when != "before":
            whole = last or effect
            # An operation that fails has no effect, and a dead process reports no error.
            with contextlib.suppress(Exception):
                (half or whole)() if self._when == "halfway" else whole()
        self._die(what)

    def _die(self, what: str) -> NoReturn:
        self.is_dead = True
        for upload in self._unfinished:
            # This closes its file; the upload stays invisible.
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
        view = memoryview(data).cast("B")
        first_half = view[: len(view) // 2]
        return self._storage._do(
            "upload.write", lambda: self._inner.write(data), half=lambda: self._inner.write(first_half)
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


def _half(names: Iterable[str]) -> Sequence[str]:
    ordered = sorted(names)
    return ordered[: (len(ordered) + 1) // 2]
