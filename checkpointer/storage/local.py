"""Local disks and mounts: stage beside the target, fsync, one rename, fsync the folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

from checkpointer._write_back import WRITE_BACK, begin_write_back
from checkpointer.errors import NameTakenError, StorageError
from checkpointer.ports import Stat, Upload
from checkpointer.storage.owner import STAGING, is_abandoned
from checkpointer.storage.unreadable import UNREADABLE, is_needed

_BUFFER: Final = 1 << 16
"""Pieces below this many bytes are joined. Larger ones go to the kernel from where they are."""
_CLAIMS: Final = ".checkpointer/terms/"
"""An empty folder below it is listed: if it has the name of a claim, no process can create that claim."""
_CLAIM: Final = "claim-"
"""Prefix of the name of a claim on a file's name."""
_FULL: Final = {errno.ENOSPC, errno.EDQUOT}
_KEPT_OF_NAME: Final = 100
"""A staged path ends with so many bytes of the final name, because some trainers choose a format by the extension."""
_TRIES: Final = 16
_NOT_ABOUT_LINKS: Final = {*_FULL, errno.ENOENT}
"""Errors that a rename would raise too. Any other error may mean that a mount refuses links: EPERM, EIO, EACCES..."""


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
                with _without_unreachable():
                    found[path] = _stat(entry.stat(follow_symlinks=False))
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
                _sync_folder(target.parent)
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
                    _sync(stream)
            _into(target.parent, lambda: os.replace(staged, target))
        except OSError:
            # On a full disk the staged part must not keep its space.
            _discard(staged)
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
            _sync_folder(folder)

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
        return _LocalUpload(staged, target, _new_file(staged))

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
            _into(path.parent, lambda: os.replace(staged, path))
        _sync_folder(path.parent)

    def free_space(self) -> int | None:
        """See `SupportsFreeSpace.free_space`."""
        try:
            usage = os.statvfs(self._root)
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
        return str(staged), _LocalUpload(staged, target, None)

    def sync(self, path: str) -> None:
        """See `SupportsPaths.sync`."""
        _sync_tree(self._root / path)
        _sync_folder((self._root / path).parent)

    def prepare(self) -> None:
        """See `SupportsSweep.prepare`."""
        try:
            with self._scratch() as staged, self._scratch() as renamed:
                # The size of a record, because an empty file fits on a full disk.
                staged.write_bytes(bytes(4096))
                os.replace(staged, renamed)
        except OSError as error:
            what = "free some space" if error.errno in _FULL else "choose a directory that this process may write to"
            if error.errno == errno.EACCES:
                what = permission_advice(error.filename or self._root)
            msg = f"cannot write to {self._root}: {error.strerror}; {what}"
            raise StorageError(msg) from error

    def sweep(self) -> int:
        """See `SupportsSweep.sweep`."""
        folders: tuple[Path, ...] = ()
        # A planted link in place of the staging folder leads to folders of other programs, which are not swept.
        with contextlib.suppress(OSError):
            folders = tuple(self._within(f"{STAGING}/x").parent.iterdir())
        abandoned = [folder for folder in folders if folder != self._staging and self._is_abandoned(folder)]
        for folder in abandoned:
            shutil.rmtree(folder, ignore_errors=True)
        return sum(not os.path.lexists(folder) for folder in abandoned)

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
            "fsync of folders": "yes" if _sync_folder(self._root) else "refused",
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
            _discard(staged)

    def _new_staged(self) -> Path:
        # The folder is made each time, because another host may sweep it after a day without a write.
        staged = self._within(f"{STAGING}/{self._staging.name}/{uuid.uuid4().hex[:12]}")
        _into(self._staging, lambda: None)
        return staged


class _LocalUpload:
    """A payload in the staging folder, on the same filesystem as its target. See `checkpointer.ports.Upload`."""

    def __init__(self, staged: Path, target: Path, stream: BinaryIO | None) -> None:
        self._staged = staged
        self._target = target
        self._stream = stream
        self._written = 0
        self._begun = 0
        """Bytes that the kernel was asked to write to the disk."""

    def write(self, data: Any) -> int:
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
        self._stream = _new_file(self._staged)
        self._written = self._begun = 0

    def finish(self) -> None:
        if self._stream is None:
            _sync_tree(self._staged)
            return
        _sync(self._stream)
        self._stream.close()

    def publish(self, *, replace: bool) -> None:
        publish = (lambda: os.replace(self._staged, self._target)) if replace else self._publish_new
        _into(self._target.parent, publish)
        _sync_folder(self._target.parent)

    def _publish_new(self) -> None:
        # If the name is taken, a link fails, but a rename would replace another writer's file.
        if not self._staged.is_dir() and self._link():
            _discard(self._staged)
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
        claim = self._staged.parent.parent / f"{_CLAIM}{name}"
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
        return NameTakenError(msg)

    def abort(self) -> None:
        if self._stream is not None:
            with contextlib.suppress(OSError):
                self._stream.close()
        _discard(self._staged)


def permission_advice(path: str | os.PathLike[str]) -> str:
    """Return who owns a path that this process may not use, its mode, and what to do."""
    for place in (Path(path), *Path(path).parents):
        try:
            info = place.stat()
        except OSError:  # It does not exist, or a folder above it denies access: then that folder is the cause.
            continue
        runs_as = f"this process runs as {_user(os.geteuid())}" if hasattr(os, "geteuid") else "this process may not"
        return (
            f"{place} belongs to {_user(info.st_uid)} with mode {stat.filemode(info.st_mode)}, and {runs_as}: run as "
            "the owner, change owner or mode (chown, chmod), or choose another directory"
        )
    return "check who owns the path, and its mode"


def _user(uid: int) -> str:
    try:
        import pwd

        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except (ImportError, KeyError):  # Windows, or a container without this user.
        return f"uid {uid}"


def _owner_of(folder: Path) -> str:
    """Return the owner of a staging folder (from its name) or of a claim (from the name that it holds)."""
    names = [entry.name for entry in folder.iterdir()] if folder.name.startswith(_CLAIM) else [folder.name]
    return names[0].rpartition("-")[0] if names else ""


def _discard(staged: Path) -> None:
    """Remove a staged file, or leave it to `sweep`: a failed clean-up must not hide the error of the write."""
    if os.path.isdir(staged):
        shutil.rmtree(staged, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        staged.unlink()


def _new_file(staged: Path) -> BinaryIO:
    return open(staged, "wb", buffering=_BUFFER)


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
    """Leave out what is gone by now, or lies so deep that its path is longer than the system takes."""
    try:
        yield
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise


def _stat(info: os.stat_result) -> Stat:
    return Stat(info.st_size, f"{info.st_mtime_ns:x}-{info.st_ino:x}")


def _sync(stream: BinaryIO) -> None:
    stream.flush()
    # Kernels before 6.13 stamp files once per tick, so a quick rewrite that gets the old inode would look unchanged.
    with contextlib.suppress(OSError, TypeError):
        os.utime(stream.fileno(), ns=(time.time_ns(),) * 2)
    os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> bool:
    """Make a folder's entries durable: without it a power loss undoes the rename. Return whether that is possible."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network mounts refuse fsync on a folder, and offer nothing stronger.
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
        return False
    finally:
        os.close(descriptor)
    return True


def _sync_tree(path: Path) -> None:
    if not path.is_dir():
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
        return
    for folder, _, files in os.walk(path):
        for name in files:
            _sync_tree(Path(folder, name))
        _sync_folder(Path(folder))


def _into(folder: Path, act: Callable[[], None]) -> None:
    """Make a folder and put a file into it.

    Between these two steps another writer may delete the last file there, and with it the folder.
    """
    for tries_left in reversed(range(_TRIES)):
        try:
            _make_folders(folder)
            return act()
        except FileNotFoundError as error:
            if tries_left:
                continue
            if folder.is_dir() and error.filename2 and os.path.lexists(error.filename):
                # FAT and similar filesystems refuse ':', '*' and '?', and some drivers raise ENOENT for it.
                msg = "this filesystem takes no such name; change the template"
                raise OSError(errno.EINVAL, msg, str(error.filename2)) from error
            raise


def _make_folders(folder: Path) -> None:
    """Make a folder and its parents, each new entry durable."""
    if folder.is_dir():
        return
    _make_folders(folder.parent)
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
    _sync_folder(folder.parent)
