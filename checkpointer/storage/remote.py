"""Whatever fsspec reaches by URL, through one implementation; what differs is a capability, found out once."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, Final, TypeVar

from fsspec.core import url_to_fs

from checkpointer.errors import NameTakenError, StorageError
from checkpointer.owner import is_dead, is_live
from checkpointer.ports import Stat, Upload
from checkpointer.storage.capabilities import OBJECT_STORES, Capabilities, probe_create, probe_rename
from checkpointer.storage.reading import reader
from checkpointer.storage.retrying import Retry, is_transient

__all__ = ["FsspecStorage", "open_remote"]

T = TypeVar("T")

STAGING: Final = ".checkpointer/staging"
REPLACING: Final = ".checkpointer/replacing"
"""Where a new file waits while the old one is removed, on servers that cannot replace in one step."""
STALE_S: Final = 24 * 3600.0
"""What a writer left that cannot be asked is swept after this many seconds."""
SMALL: Final = 1 << 20
"""Files up to this many bytes are kept in memory and sent in one request."""
_CLAIM_ATTEMPTS: Final = 8

_EXTRAS: Final = {
    "s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure",
    "sftp": "sftp", "ssh": "sftp", "smb": "smb", "webdav": "webdav", "hdfs": "hdfs", "webhdfs": "webhdfs",
}  # fmt: skip


def open_remote(url: str, owner: str, options: Mapping[str, Any]) -> FsspecStorage:
    """Return the storage for a URL: for S3 the one that knows multipart uploads, else the general one."""
    if url.partition("://")[0] in ("s3", "s3a"):
        from checkpointer.storage.s3 import S3Storage

        return S3Storage(url, owner, **options)
    return FsspecStorage(url, owner, **options)


class FsspecStorage:
    """Files under an fsspec URL, such as ``sftp://host/runs/digits`` or ``gs://bucket/runs/digits``.

    Args:
        url: Any URL that fsspec knows. A password in it is never shown.
        owner: Id of the writer, from `checkpointer.owner.new_owner`.
        retry: How long to go on trying when the server or the way to it fails.
        **options: What the filesystem takes (``storage_options``); never logged, never stored.

    Raises:
        StorageError: If the URL's driver is not installed or not known, or there is no connection.

    Example:
        >>> storage = FsspecStorage("memory://runs/digits")
        >>> storage.write("a/b", b"data")
        >>> storage.list()["a/b"].size
        4
        >>> storage.delete("a")
    """

    def __init__(self, url: str, owner: str = "", *, retry: Retry | None = None, **options: Any) -> None:
        self._url = url
        self._owner = owner
        self._options = options
        self._retry = retry or Retry()
        self._staging = f"{STAGING}/{owner or 'nobody'}-{uuid.uuid4().hex[:8]}"
        self._protocol = url.partition("://")[0]
        self._is_object_store = self._protocol in OBJECT_STORES
        self._folders: set[str] = set()
        self._connect()

    def _connect(self) -> None:
        self._is_cut = False
        self._folders.clear()
        try:
            self._fs, root = url_to_fs(self._url, skip_instance_cache=True, **self._options)
        except (ImportError, ValueError) as error:
            extra = _EXTRAS.get(self._protocol)
            package = f"pip install 'torch-checkpointer[{extra}]'" if extra else "see fsspec's list of filesystems"
            msg = f"no driver for {self._protocol}:// ({error}); install it: {package}"
            raise StorageError(msg) from error
        except Exception as error:
            if is_transient(error):
                raise
            msg = f"cannot connect to {self}: {type(error).__name__}: {error}"
            raise StorageError(msg) from error
        self._root = root.rstrip("/")

    def __str__(self) -> str:
        return re.sub(r"(?<=://)[^/@]*@", "", self._url)

    # Every request goes through here

    def _try(self, what: str, do: Callable[[], T]) -> T:
        """Do it, again if the failure is transient; every error comes out as an `OSError`."""

        def attempt() -> T:
            if self._is_cut:
                self._connect()
            try:
                return do()
            except Exception as error:
                # A session over ssh does not survive its connection; object stores connect anew by themselves.
                self._is_cut = is_transient(error) and not self._is_object_store
                raise

        with as_os_errors(what):
            return self._retry(attempt, f"{what} in {self}")

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root

    # Storage

    def list(self, prefix: str = "") -> dict[str, Stat]:
        """See `Storage.list`; unfinished writes are not listed."""
        found = {path: info for path, info in self._find(prefix).items() if not path.startswith(f"{STAGING}/")}
        waiting = f"{REPLACING}/"
        if not self._is_object_store and not prefix.startswith(".checkpointer/") and prefix and not found:
            found = self._find(waiting + prefix)
        for path in [path for path in found if path.startswith(waiting)]:
            info = found.pop(path)
            found.setdefault(path[len(waiting) :], info)
        return {path: _stat(info) for path, info in found.items()}

    def _find(self, prefix: str) -> dict[str, Mapping[str, Any]]:
        """Return what the driver says of every file at or below ``prefix``, by its path."""

        def find() -> dict[str, Mapping[str, Any]]:
            self._fs.invalidate_cache()
            try:
                found = self._fs.find(self._path(prefix), detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return {}
            # Filesystems differ in whether they return names with their leading slash.
            root = f"{self._root}/".lstrip("/")
            # For a single file some of them find a name without its details.
            return {n.lstrip("/")[len(root) :]: info or self._fs.info(n) for n, info in found.items()}

        return self._try(f"listing {prefix!r}", find)

    def open(self, path: str) -> BinaryIO:
        """See `Storage.open`."""
        try:
            return self._open(path)
        except FileNotFoundError:
            if self._is_object_store:
                raise
            return self._open(f"{REPLACING}/{path}")
        except OSError as error:
            # Below a file, or a folder: drivers say anything.
            if path in self._find(path):
                raise
            raise FileNotFoundError(errno.ENOENT, "no such file", path) from error

    def _open(self, path: str) -> BinaryIO:
        def begin() -> Any:
            if self._is_cut:
                self._connect()
            try:
                stream = self._fs.open(self._path(path), "rb")
            except Exception as error:
                self._is_cut = is_transient(error) and not self._is_object_store
                raise
            # Over ssh: ask for the next blocks before they are needed.
            if hasattr(stream, "prefetch"):
                stream.prefetch()
            return stream

        with as_os_errors(f"opening {path}"):
            return reader(begin, path, self._retry)

    def write(self, path: str, data: bytes) -> None:
        """See `Storage.write`."""
        self._try(f"writing {path}", lambda: self._put(path, data))

    def delete(self, path: str) -> None:
        """See `Storage.delete`; folders above that are empty now go too."""
        for name in sorted(self._find(path)):
            self._try(f"deleting {name}", functools.partial(self._remove, name))
        if not self._is_object_store:
            self._remove_folders(path)

    def _remove(self, path: str) -> None:
        full = self._path(path)
        with contextlib.suppress(FileNotFoundError):
            try:
                self._fs.rm_file(full)
            except NotImplementedError:
                self._fs.rm(full)

    def _remove_folders(self, path: str) -> None:
        """Remove the folders that are empty now, at and below the path and above it, as far as they are."""
        folders: list[str] = []
        with contextlib.suppress(Exception):
            self._fs.invalidate_cache()
            found = self._fs.find(self._path(path), withdirs=True)
            folders += sorted((name for name in found if len(name) > len(self._path(path))), key=len, reverse=True)
        folders.append(self._path(path))
        if not path.startswith(".checkpointer/"):
            parts = path.split("/")[:-1]
            folders += [self._path("/".join(parts[:count])) for count in range(len(parts), 0, -1)]
        for folder in folders:
            # A folder that is not empty stays: some servers refuse, others must not be asked to.
            with contextlib.suppress(Exception):
                if self._fs.isdir(folder) and not self._fs.ls(folder, detail=False):
                    self._fs.rmdir(folder)
        self._folders.clear()

    def upload(self, path: str) -> Upload:
        """See `Storage.upload`."""
        return RemoteUpload(self, path)

    # Writing: in place where that is atomic, else staged and renamed

    def _put(self, path: str, data: bytes) -> None:
        if self.capabilities.put == "atomic":
            self._fs.pipe_file(self._path(path), data)
            return
        staged = self._stage(data)
        self._move_over(staged, path)

    def _stage(self, data: bytes) -> str:
        staged = f"{self._staging}/{uuid.uuid4().hex[:12]}"
        self._make_parents(staged)
        with self._fs.open(self._path(staged), "wb") as stream:
            stream.write(data)
        return staged

    def _make_parents(self, path: str) -> None:
        folder = path.rpartition("/")[0]
        if not self._is_object_store and folder not in self._folders:
            self._fs.makedirs(self._path(folder), exist_ok=True)
            self._folders.add(folder)

    def _move(self, source: str, target: str) -> None:
        """Rename a file; where there is no rename the server copies it. Done twice, it succeeds twice."""
        self._make_parents(target)
        full, to = self._path(source), self._path(target)
        try:
            if self._is_object_store:
                self._fs.cp_file(full, to)
                self._fs.rm_file(full)
            else:
                self._fs.mv(full, to)
        except FileNotFoundError:
            # The reply to an earlier attempt was lost: the staged name is unique, so it is there by our hand.
            if source in self._find(source) or target not in self._find(target):
                raise
        if not self._is_object_store:
            self._check_moved(source, target)

    def _check_moved(self, source: str, target: str) -> None:
        # WebHDFS says nothing at all when it refuses.
        if source.startswith(self._staging) and self._find(source):
            raise FileExistsError(errno.EEXIST, "the server did not rename", target)

    def _move_over(self, staged: str, path: str) -> None:
        """Rename over what is there, in one step, or in steps of which a reader sees none (see `open`)."""
        if self.capabilities.rename != "refuses" or path not in self._find(path):
            self._move(staged, path)
            return
        waiting = f"{REPLACING}/{path}"
        if waiting in self._find(waiting):
            self._remove(waiting)
        self._move(staged, waiting)
        self._remove(path)
        self._move(waiting, path)

    # Creating: of two writers of one name, one wins

    def create(self, path: str, data: bytes) -> None:
        """Write a small file that must not be there yet.

        Raises:
            NameTakenError: If it is there, or another writer is about to create it.
        """
        if self.list(path):
            raise self._taken(path)
        try:
            self._try(f"creating {path}", lambda: self._create(path, data))
        except OSError as error:
            # A lost reply makes the retry of our own write look like somebody else's.
            if not _is_refusal(error):
                raise
            if self._holds(path, data):
                return
            if self.list(path):
                raise self._taken(path) from error
            # SeaweedFS refuses a name that was a folder once. Nothing is there: the claims decide.
            self._try(f"creating {path}", lambda: self._create_claimed(path, data))

    def _create(self, path: str, data: bytes) -> None:
        if self.capabilities.put == "staged":
            self._move_new(self._stage(data), path)
        elif self.capabilities.create == "refuses":
            self._fs.pipe_file(self._path(path), data, mode="create")
        else:
            self._create_claimed(path, data)

    def _create_claimed(self, path: str, data: bytes) -> None:
        with self._claim(path):
            self._put(path, data)
            if not self._holds(path, data):
                raise self._taken(path)

    def _move_new(self, staged: str, path: str) -> None:
        """Rename to a name that is free."""
        if self.capabilities.rename == "refuses":
            self._move(staged, path)
            return
        with self._claim(path):
            self._move(staged, path)

    @contextlib.contextmanager
    def _claim(self, path: str) -> Iterator[None]:
        """Keep others from creating ``path``, on a server that would let both: say so, then look who else does.

        Whoever sees another claim steps back, so at most one goes on; that both step back is rare, and tried again.
        """
        key = f"/claim-{hashlib.sha256(path.encode()).hexdigest()[:32]}"
        mine = self._staging + key
        for attempt in range(_CLAIM_ATTEMPTS):
            self._make_parents(mine)
            self._fs.pipe_file(self._path(mine), b"")
            try:
                found = self._find(STAGING)
                if not any(other.endswith(key) and other != mine and not _is_dead(other) for other in found):
                    if self._find(path):
                        raise self._taken(path)
                    yield
                    return
            finally:
                with contextlib.suppress(OSError):
                    self._remove(mine)
            time.sleep(0.01 * 2**attempt * (1 + uuid.uuid4().int % 8))
        raise self._taken(path)

    def _holds(self, path: str, data: bytes) -> bool:
        try:
            with self._open(path) as stream:
                return stream.read(len(data) + 1) == data
        except FileNotFoundError:
            return False

    def _taken(self, path: str) -> NameTakenError:
        msg = f"{path} appeared in {self} while it was about to be written; nothing was replaced"
        return NameTakenError(msg)

    # SupportsCopy

    def copy(self, source: str, path: str) -> None:
        """See `SupportsCopy.copy`."""
        if self.capabilities.copy == "client":
            raise OSError(errno.ENOTSUP, f"{self._protocol}:// does not copy on the server", source)
        names = [*self._find(source)]
        if not names:
            raise FileNotFoundError(errno.ENOENT, "there is nothing to copy", source)
        copies = [path + name[len(source) :] for name in names]
        if [*self._find(path)] not in ([], copies):
            self.delete(path)
        for name, copy in zip(names, copies, strict=True):
            self._try(f"copying {name} to {copy}", functools.partial(self._copy, name, copy))

    def _copy(self, source: str, target: str) -> None:
        if self.capabilities.put == "atomic":
            self._fs.cp_file(self._path(source), self._path(target))
            return
        staged = f"{self._staging}/{uuid.uuid4().hex[:12]}"
        self._make_parents(staged)
        self._fs.cp_file(self._path(source), self._path(staged))
        self._move_over(staged, target)

    # SupportsSweep

    def prepare(self) -> None:
        """See `SupportsSweep.prepare`; finds out what the server can do."""
        try:
            if self.capabilities.put != "atomic":
                return  # It was tried.
            self._try("writing a first file", lambda: self._put(f"{self._staging}/probe", b""))
            self._remove(f"{self._staging}/probe")
        except OSError as error:
            msg = f"cannot write to {self}: {error}; choose a directory that these credentials may write to"
            raise StorageError(msg) from error

    @functools.cached_property
    def capabilities(self) -> Capabilities:
        """What the server can do, found out by trying, at first use."""
        return self._try("probing", self._probe)

    def _probe(self) -> Capabilities:
        here = f"{self._staging}/probe"
        self._make_parents(here)
        if self._is_object_store:
            return Capabilities("atomic", "none", probe_create(self._fs, self._path(here)), "server")

        def move(source: str, target: str) -> None:
            self._fs.mv(source, target)

        rename = probe_rename(self._fs, move, self._path(here), self._path(f"{here}-2"))
        copy = self._probe_copy(f"{here}-2", f"{here}-3")
        for name in self._find(self._staging):
            if name.startswith(here):
                self._remove(name)
        return Capabilities("staged", rename, "refuses" if rename == "refuses" else "claims", copy)

    def _probe_copy(self, source: str, target: str) -> Any:
        # These read the file and write it again, behind a method of that name.
        if self._protocol in ("webhdfs", "hdfs", "ftp"):
            return "client"
        try:
            self._fs.cp_file(self._path(source), self._path(target))
        except Exception:  # Whatever it is, this driver does not offer it.
            return "client"
        return "server"

    def sweep(self) -> int:
        """See `SupportsSweep.sweep`."""
        count = 0
        for path, info in self._find(STAGING).items():
            if not path.startswith(self._staging + "/") and (_is_dead(path) or self._is_stale(path, info)):
                with contextlib.suppress(OSError):
                    self._sweep_one(path)
                    count += 1
        return count

    def _sweep_one(self, path: str) -> None:
        self.delete(path)

    def _is_stale(self, path: str, info: Mapping[str, Any]) -> bool:
        modified = _modified_s(info)
        return not is_live(_owner(path)) and modified is not None and time.time() - modified > STALE_S

    def close(self) -> None:
        """See `SupportsSweep.close`."""
        with contextlib.suppress(OSError):
            self.delete(self._staging)


class RemoteUpload:
    """A payload on its way: small ones wait in memory, larger ones stream. See `checkpointer.ports.Upload`."""

    def __init__(self, storage: FsspecStorage, path: str) -> None:
        self._storage = storage
        self._path = path
        self._buffer = bytearray()
        self._stream: StagedStream | None = None

    def write(self, data: Any) -> int:
        """See `Upload.write`."""
        view = memoryview(data).cast("B")
        if self._stream is None and len(self._buffer) + len(view) <= SMALL:
            self._buffer += view
        else:
            if self._stream is None:
                self._stream = StagedStream(self._storage, self._path)
                self._stream.write(self._buffer)
                self._buffer = bytearray()
            self._stream.write(view)
        return len(view)

    def finish(self) -> None:
        """See `Upload.finish`."""
        if self._stream is not None:
            self._stream.finish()

    def publish(self, *, replace: bool) -> None:
        """See `Upload.publish`."""
        if self._stream is not None:
            self._stream.publish(replace=replace)
        elif replace:
            self._storage.write(self._path, bytes(self._buffer))
        else:
            self._storage.create(self._path, bytes(self._buffer))

    def abort(self) -> None:
        """See `Upload.abort`."""
        if self._stream is not None:
            self._stream.abort()


class StagedStream:
    """A payload that is written to the staging folder, and renamed or copied to its name by the server."""

    def __init__(self, storage: FsspecStorage, path: str) -> None:
        self._storage = storage
        self._path = path
        self._staged = f"{storage._staging}/{uuid.uuid4().hex[:12]}"
        self._size = 0
        self._is_open = True
        self._stream = storage._try(f"staging {path}", self._begin)

    def _begin(self) -> Any:
        self._storage._make_parents(self._staged)
        stream = self._storage._fs.open(self._storage._path(self._staged), "wb")
        # Over ssh: do not wait for the answer to each block.
        if hasattr(stream, "set_pipelined"):
            stream.set_pipelined(True)
        return stream

    def write(self, data: Any) -> None:
        with self._errors():
            self._stream.write(data)
        self._size += len(data)

    def finish(self) -> None:
        with self._errors():
            self._stream.close()
        there = self._storage._find(self._staged).get(self._staged, {}).get("size")
        if there != self._size:
            msg = f"{self._size} bytes of {self._path} were sent, and {there} have arrived"
            raise OSError(errno.EIO, msg)

    def publish(self, *, replace: bool) -> None:
        storage, path = self._storage, self._path
        if replace:
            storage._try(f"publishing {path}", lambda: storage._move_over(self._staged, path))
        else:
            if storage.list(path):
                raise storage._taken(path)
            try:
                storage._try(f"publishing {path}", lambda: storage._move_new(self._staged, path))
            except OSError as error:
                if _is_refusal(error) and storage._find(self._staged):
                    raise storage._taken(path) from error
                raise
        self._is_open = False

    def abort(self) -> None:
        if self._is_open:
            self._is_open = False
            with contextlib.suppress(Exception):
                self._stream.close()
            with contextlib.suppress(Exception):
                self._storage._remove(self._staged)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            with as_os_errors(f"sending {self._path}"):
                yield
        except OSError as error:
            self._storage._is_cut = is_transient(error) and not self._storage._is_object_store
            raise


@contextlib.contextmanager
def as_os_errors(what: str) -> Iterator[None]:
    """Let whatever a driver raises come out as the `OSError` that `Storage` promises."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        msg = f"{what}: {type(error).__name__}: {error}"
        raise OSError(errno.EIO, msg) from error


def _is_refusal(error: BaseException) -> bool:
    """Return whether the server said that the name is taken, in whatever words its driver chose."""
    if isinstance(error, FileExistsError) or getattr(error, "errno", None) == errno.EEXIST:
        return True
    texts = f"{type(error).__name__} {error} {error.__cause__!r}".lower()
    return any(word in texts for word in ("precondition", "pre-condition", "already exists", "alreadyexists"))


def _owner(path: str) -> str:
    return path[len(STAGING) + 1 :].partition("/")[0].rpartition("-")[0]


def _is_dead(path: str) -> bool:
    return is_dead(_owner(path))


def _modified_s(info: Mapping[str, Any]) -> float | None:
    """Return when a file was last written, in seconds since the epoch, if the driver says so in any way."""
    for key in ("LastModified", "last_modified", "mtime", "modified", "updated", "last_write_time", "created"):
        value = info.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if hasattr(value, "timestamp"):
            return float(value.timestamp())
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                return _parse_time(value)
    for key in ("modificationTime", "modification_time"):
        if isinstance(info.get(key), (int, float)):
            return float(info[key]) / 1000
    return None


def _parse_time(text: str) -> float:
    import datetime

    return datetime.datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def _stat(info: Mapping[str, Any]) -> Stat:
    size = int(info.get("size") or 0)
    for key in ("ETag", "etag", "generation", "md5Hash"):
        if info.get(key):
            return Stat(size, str(info[key]))
    modified = _modified_s(info)
    if modified is None:
        return Stat(size, "")
    return Stat(size, f"{modified:.6f}", modified_s=modified if modified.is_integer() else None)
