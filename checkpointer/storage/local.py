"""Local disks and mounts: stage beside the target, fsync, one rename, fsync the folder."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Final

from checkpointer.errors import StorageError
from checkpointer.ports import Stat, Upload
from checkpointer.storage.durable_files import discard, put_into, sync_file, sync_folder, sync_tree
from checkpointer.storage.local_upload import CLAIM, FULL, LocalUpload, new_file
from checkpointer.storage.owner import STAGING, is_abandoned
from checkpointer.storage.unreadable import UNREADABLE, is_needed, permission_advice

_CLAIMS: Final = ".checkpointer/terms/"
"""An empty folder below it is listed: if it has the name of a claim, no process can create that claim."""
_KEPT_OF_NAME: Final = 100
"""A staged path ends with so many bytes of the final name, because some trainers choose a format by the extension."""


class LocalStorage:
    """A folder of a mounted filesystem.

    Args:
        root: The folder. ``~`` is expanded. A relative path is made absolute now, so a later ``chdir`` has no effect.
        owner: Id of the writer, from `checkpointer.storage.owner.new_owner`.

    Raises:
        StorageError: If ``root`` is a file.
    """

    def __init__(self, root: str | os.PathLike[str], owner: str) -> None:
        self._root = Path(root).expanduser().absolute()
        self._staging = self._root / STAGING / f"{owner}-{uuid.uuid4().hex[:8]}"
        # In a folder without permission os.path returns False, where Path.exists raises. Later errors name its owner.
        if os.path.exists(self._root) and not os.path.isdir(self._root):
            msg = f"{self._root} is a file; the manager needs a folder"
            raise StorageError(msg)

    def __str__(self) -> str:
        return str(self._root)

    def list(self, prefix: str = "") -> dict[str, Stat]:
        """See `Storage.list`; unfinished writes are not listed.

        If this process may not read a folder, such as ``lost+found`` or that of another user, the folder is listed
        instead of its files. `HOME` and the folders in it are an exception, because records may be hidden there.
        """
        base = os.path.join(self._root, prefix)
        found: dict[str, Stat] = {}
        if f"{prefix}/".startswith(f"{STAGING}/"):
            return found
        try:
            info = os.lstat(base)
            if not stat.S_ISDIR(info.st_mode):
                return {prefix: _stat(info)}
        except (FileNotFoundError, NotADirectoryError):
            return found
        except PermissionError:
            if is_needed(prefix, is_asked_for=True):
                raise
            return {prefix: UNREADABLE}
        folders = [prefix]
        while folders:
            name = folders.pop()
            try:
                folders += self._look_into(name, found)
            except PermissionError:
                if is_needed(name, is_asked_for=name == prefix):
                    raise
                found[name] = UNREADABLE
        return found

    def _look_into(self, name: str, found: dict[str, Stat]) -> Sequence[str]:
        """Add the files of a folder to ``found``, and return the folders in it."""
        above, folders, is_empty = name + "/" if name else "", [], False
        with _without_unreachable(), os.scandir(os.path.join(self._root, name)) as entries:
            is_empty = True
            for entry in entries:
                path, is_empty = above + entry.name, False
                if entry.is_dir(follow_symlinks=False):
                    folders += [] if path == STAGING else [path]
                    continue
                try:
                    found[path] = _stat(entry.stat(follow_symlinks=False))
                except OSError as error:
                    if not _is_unreachable(error):
                        raise
        if is_empty and above.startswith(_CLAIMS):
            found[name] = UNREADABLE
        return folders

    def open(self, path: str) -> BinaryIO:
        """See `Storage.open`."""
        try:
            return _open_file(self._root / path)
        except OSError as error:
            # A file stands where its folder would be; or it is a link to itself, or a socket.
            if error.errno not in (errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
                raise
            raise FileNotFoundError(errno.ENOENT, os.strerror(error.errno), path) from error

    def write(self, path: str, data: bytes) -> None:
        """See `Storage.write`."""
        target = self._within(path)
        for is_retry in (False, True):
            try:
                self._replace(target, data, durable=True)
                sync_folder(target.parent)
                return
            except FileNotFoundError:
                # The directory was removed meanwhile, and the staged file with it.
                if is_retry:
                    raise

    def write_scratch(self, path: str, data: bytes) -> None:
        """See `SupportsScratch.write_scratch`."""
        try:
            self._replace(self._within(path), data, durable=False)
        except FileNotFoundError:
            self.write(path, data)

    def delete_scratch(self, path: str) -> None:
        """See `SupportsScratch.delete_scratch`."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(self._within(path))

    def _replace(self, target: Path, data: bytes, *, durable: bool) -> None:
        staged = self._new_staged()
        try:
            with open(staged, "wb") as stream:
                stream.write(data)
                if durable:
                    sync_file(stream)
            put_into(target.parent, lambda: os.replace(staged, target))
        except OSError:
            # On a full disk the staged part must not keep its space.
            discard(staged)
            raise

    def delete(self, path: str) -> None:
        """See `Storage.delete`; the folders above that are empty then are removed too, up to the root."""
        target = self._within(path)
        if target.is_dir() and not target.is_symlink():
            self._delete_folder(target)
        else:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.unlink(target)
        folder = target.parent
        while folder != self._root and self._root in folder.parents and ".checkpointer" not in folder.parts:
            try:
                folder.rmdir()
            except OSError:
                break
            folder = folder.parent
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            sync_folder(folder)

    def _delete_folder(self, target: Path) -> None:
        """Rename the folder away in one step, so that readers never see half of it, and remove it afterwards."""
        staged = self._new_staged()
        try:
            os.rename(target, staged)
        except OSError:  # It is a mount point, or the filesystem does not rename folders.
            shutil.rmtree(target)
            return
        shutil.rmtree(staged)  # If a part cannot be removed, `sweep` tries again.

    def upload(self, path: str) -> Upload:
        """See `Storage.upload`."""
        target = self._within(path)
        staged = self._new_staged()
        return LocalUpload(staged, target, new_file(staged))

    def _within(self, path: str) -> Path:
        """Return the full path of a file to change, or raise if a link leads out of the directory.

        A user who can put a link into the directory must not make the manager write or delete elsewhere.
        """
        target = self._root / path
        for folder in (self._root / part for part in Path(path).parents if part.parts):
            if folder.is_symlink():
                msg = (
                    f"{folder} is a symbolic link, so {path!r} lies elsewhere; nothing is written or deleted there: "
                    "put a real folder in its place, or give the manager the directory that it leads to"
                )
                raise StorageError(msg)
        return target

    def symlink(self, target: str, path: str) -> None:
        """See `SupportsLinks.symlink`."""
        link = self._within(path)
        self._link(link, lambda staged: os.symlink(os.path.relpath(self._root / target, link.parent), staged))

    def hardlink(self, target: str, path: str) -> None:
        """See `SupportsLinks.hardlink`."""
        if (self._root / target).is_dir():
            raise OSError(errno.EPERM, "folders have no hard links", target)
        self._link(self._within(path), lambda staged: os.link(self._root / target, staged))

    def _link(self, path: Path, make: Callable[[Path], None]) -> None:
        # The staged link is discarded, because a rename between two names of one file does nothing and keeps both.
        with self._scratch() as staged:
            make(staged)
            try:
                put_into(path.parent, lambda: os.replace(staged, path))
            except IsADirectoryError as error:
                raise IsADirectoryError(error.errno, "a folder has this name; move it away", str(path)) from error
        sync_folder(path.parent)

    def free_space(self) -> int | None:
        """See `SupportsFreeSpace.free_space`."""
        root = self._root
        while not root.exists() and root != root.parent:  # It is made at the first write, on the same filesystem.
            root = root.parent
        try:
            usage = os.statvfs(root)
        except (OSError, AttributeError):
            return None
        return usage.f_bavail * usage.f_frsize

    def local_path(self, path: str) -> str:
        """See `SupportsPaths.local_path`."""
        return str(self._root / path)

    def stage(self, path: str) -> tuple[str, Upload]:
        """See `SupportsPaths.stage`."""
        target = self._within(path)
        staged = self._new_staged()
        end = os.fsencode(target.name)[-_KEPT_OF_NAME:].decode(errors="ignore")
        staged = staged.with_name(f"{staged.name}-{end}")
        return str(staged), LocalUpload(staged, target, None)

    def sync(self, path: str) -> None:
        """See `SupportsPaths.sync`."""
        sync_tree(self._root / path)
        sync_folder((self._root / path).parent)

    def prepare(self) -> None:
        """See `SupportsSweep.prepare`."""
        try:
            with self._scratch() as staged, self._scratch() as renamed:
                # The size of a record, because an empty file fits on a full disk.
                staged.write_bytes(bytes(4096))
                os.replace(staged, renamed)
        except OSError as error:
            raise cannot_write(self._root, error) from error

    def sweep(self) -> int:
        """See `SupportsSweep.sweep`."""
        abandoned = [folder for folder in self._staging_folders() if self._is_abandoned(folder)]
        for folder in abandoned:
            shutil.rmtree(folder, ignore_errors=True)
        return sum(not os.path.lexists(folder) for folder in abandoned)

    def discard(self, owner: str) -> None:
        """See `SupportsDiscard.discard`. Claims of names stay, because this writer may be about to rename to them."""
        for folder in self._staging_folders():
            if not folder.is_symlink() and not folder.name.startswith(CLAIM) and _owner_of(folder) == owner:
                # It leaves in one step, because the owner may be about to publish a folder that lies in it.
                with contextlib.suppress(OSError):
                    gone = self._new_staged()
                    os.rename(folder, gone)
                    shutil.rmtree(gone, ignore_errors=True)

    def _staging_folders(self) -> tuple[Path, ...]:
        """Return the folders of other writers; none if a planted link leads to folders of another program."""
        with contextlib.suppress(OSError):
            return tuple(each for each in self._within(f"{STAGING}/x").parent.iterdir() if each != self._staging)
        return ()

    def _is_abandoned(self, folder: Path) -> bool:
        # A file or link that is not a folder of this library, or a folder of another user, is foreign.
        try:
            return not folder.is_symlink() and is_abandoned(
                _owner_of(folder), lambda: self.server_time() - folder.stat().st_mtime
            )
        except OSError:
            return False

    def server_time(self) -> float:
        """See `SupportsServerTime.server_time`. On a network mount it is the time of the server."""
        with self._scratch() as staged:
            staged.touch()
            return staged.stat().st_mtime

    def close(self) -> None:
        """See `SupportsSweep.close`."""
        shutil.rmtree(self._staging, ignore_errors=True)
        with contextlib.suppress(OSError):
            (self._root / STAGING).rmdir()

    def capabilities(self) -> Mapping[str, str]:
        """See `SupportsCapabilities.capabilities`."""
        hard = self._can(os.link)
        return {
            "replace": "rename",
            "create": "link, refused by the filesystem" if hard else "rename, under a claim",
            "copy": "hard link" if hard else "through this process",
            "link": "symlink" if self._can(os.symlink) else "none",
            "fsync of folders": "yes" if sync_folder(self._root) else "refused",
        }

    def _can(self, make: Callable[[Path, Path], None]) -> bool:
        with self._scratch() as staged, self._scratch() as link:
            try:
                staged.touch()
                make(staged, link)
            except OSError:
                return False
        return True

    @contextlib.contextmanager
    def _scratch(self) -> Iterator[Path]:
        staged = self._new_staged()
        try:
            yield staged
        finally:
            discard(staged)

    def _new_staged(self) -> Path:
        # The folder is made each time, because another host may sweep it after a day without a write.
        staged = self._within(f"{STAGING}/{self._staging.name}/{uuid.uuid4().hex[:12]}")
        put_into(self._staging, lambda: None)
        return staged


def cannot_write(place: object, error: OSError) -> StorageError:
    """Return the error of a directory that this process cannot write to, with what to do."""
    what = "free some space" if error.errno in FULL else "choose a directory that this process may write to"
    if error.errno == errno.EACCES:
        what = permission_advice(error.filename or str(place))
    return StorageError(f"cannot write to {place}: {error.strerror}; {what}")


def _owner_of(folder: Path) -> str:
    """Return the owner of a staging folder (from its name) or of a claim (from the name that it holds)."""
    names = [entry.name for entry in folder.iterdir()] if folder.name.startswith(CLAIM) else [folder.name]
    return names[0].rpartition("-")[0] if names else ""


def _open_file(path: Path) -> BinaryIO:
    # O_NONBLOCK, because opening a planted pipe would otherwise wait for its writer.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise FileNotFoundError(errno.ENOENT, "it is a pipe or device, not a file", str(path))


@contextlib.contextmanager
def _without_unreachable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if not _is_unreachable(error):
            raise


def _is_unreachable(error: OSError) -> bool:
    """Return whether a file is gone by now, or lies so deep that its path is longer than the system takes."""
    return isinstance(error, FileNotFoundError) or error.errno == errno.ENAMETOOLONG


def _stat(info: os.stat_result) -> Stat:
    return Stat(info.st_size, f"{info.st_mtime_ns:x}-{info.st_ino:x}")
