"""A payload on a disk or mount, from the staged file until it has its name: see `checkpointer.storage.local`."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

from checkpointer._write_back import WRITE_BACK, begin_write_back
from checkpointer.errors import NameTakenError
from checkpointer.storage.durable_files import discard, put_into, sync_file, sync_folder, sync_tree

CLAIM: Final = "claim-"
"""Prefix of the name of a claim on a file's name."""
FULL: Final = {errno.ENOSPC, errno.EDQUOT}
_BUFFER: Final = 1 << 16
"""Pieces below this many bytes are joined. Larger ones go to the kernel from where they are."""
_NOT_ABOUT_LINKS: Final = {*FULL, errno.ENOENT}
"""Errors that a rename would raise too. Any other error may mean that a mount refuses links: EPERM, EIO, EACCES..."""


class LocalUpload:
    """A payload in the staging folder, on the same filesystem as its target. See `checkpointer.ports.Upload`."""

    def __init__(self, staged: Path, target: Path, stream: BinaryIO | None) -> None:
        self._staged = staged
        self._target = target
        self._stream = stream
        self._written = 0
        self._begun = 0
        """Bytes that the kernel was asked to write to the disk."""

    def write(self, data: Any) -> int:
        """See `Upload.write`."""
        assert self._stream is not None, "a staged path is written by its owner"
        count = self._stream.write(data)
        self._written += count
        if self._written - self._begun >= WRITE_BACK:
            begin_write_back(self._stream.fileno(), self._begun, self._written - self._begun)
            self._begun = self._written
        return count

    @property
    def descriptor(self) -> int | None:
        """That of the staged file. Another process may write to it; `finish` syncs what it has written."""
        return self._stream.fileno() if self._stream is not None else None

    def start_over(self) -> None:
        """See `checkpointer.ports.SupportsDescriptor`."""
        assert self._stream is not None, "it has a descriptor"
        self._staged.unlink(missing_ok=True)
        self._stream.close()
        self._stream = new_file(self._staged)
        self._written = self._begun = 0

    def finish(self) -> None:
        """See `Upload.finish`."""
        if self._stream is None:
            sync_tree(self._staged)
            return
        sync_file(self._stream)
        self._stream.close()

    def publish(self, *, replace: bool) -> None:
        """See `Upload.publish`."""
        publish = (lambda: os.replace(self._staged, self._target)) if replace else self._publish_new
        put_into(self._target.parent, publish)
        sync_folder(self._target.parent)

    def _publish_new(self) -> None:
        # If the name is taken, a link fails, but a rename would replace another writer's file.
        if not self._staged.is_dir() and self._link():
            discard(self._staged)
            return
        with self._claim():
            if os.path.lexists(self._target):
                raise self._taken()
            with self._as_taken():
                os.rename(self._staged, self._target)

    def _link(self) -> bool:
        """Link the target to the staged file; return whether this filesystem has links."""
        try:
            os.link(self._staged, self._target)
        except OSError as error:
            # A network mount may lose the reply, send the request again, and report that the link exists.
            with contextlib.suppress(OSError):
                if os.path.samestat(os.lstat(self._staged), os.lstat(self._target)):
                    return True
            if isinstance(error, FileExistsError):
                raise self._taken() from error
            if error.errno in _NOT_ABOUT_LINKS:
                raise
            return False
        return True

    @contextlib.contextmanager
    def _claim(self) -> Iterator[None]:
        """Reserve the name between the check and the rename. If this writer dies, the claim is swept.

        The claim is a folder that holds its owner's name. It appears by one rename, so it never exists without its
        owner, and no second claim can be renamed over it.
        """
        name = hashlib.sha256(os.fsencode(self._target)).hexdigest()[:32]
        claim = self._staged.parent.parent / f"{CLAIM}{name}"
        own = self._staged.with_name(f"{self._staged.name}-claim")
        (own / self._staged.parent.name).mkdir(parents=True)
        try:
            with self._as_taken():
                os.rename(own, claim)
        except OSError:
            shutil.rmtree(own, ignore_errors=True)
            raise
        try:
            yield
        finally:
            shutil.rmtree(claim, ignore_errors=True)

    @contextlib.contextmanager
    def _as_taken(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # A rename over a folder that is not empty: ext4 raises ENOTEMPTY, XFS raises EEXIST.
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise self._taken() from error
            raise

    def _taken(self) -> NameTakenError:
        msg = f"{self._target} appeared while it was about to be written; nothing was replaced"
        with contextlib.suppress(OSError):
            if not self._target.is_symlink() and not any(self._target.iterdir()):
                msg = f"an empty folder has the name {self._target}; remove it"
        return NameTakenError(msg)

    def abort(self) -> None:
        """See `Upload.abort`."""
        if self._stream is not None:
            with contextlib.suppress(OSError):
                self._stream.close()
        discard(self._staged)


def new_file(staged: Path) -> BinaryIO:
    """Return a new staged file, to write to."""
    return open(staged, "wb", buffering=_BUFFER)
