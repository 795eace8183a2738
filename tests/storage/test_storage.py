"""The storage contract for each backend, the faults of disks, and the storage that dies."""

from __future__ import annotations

import contextlib
import errno
import gc
import inspect
import io
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import pytest

from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy, testing
from checkpointer.errors import NameTakenError, SaveError, StorageError
from checkpointer.ports import (
    Storage,
    SupportsCopy,
    SupportsFreeSpace,
    SupportsLinks,
    SupportsPaths,
    SupportsSweep,
    Upload,
)
from checkpointer.storage import LocalStorage, open_storage
from checkpointer.storage.owner import is_dead, is_live, new_owner
from checkpointer.storage.remote import FsspecStorage
from checkpointer.testing import (
    Crash,
    CrashingStorage,
    FakeClock,
    MemoryStorage,
    StorageContract,
    die,
)
from checkpointer.tools.catalog import look_at

PORTS = (SupportsLinks, SupportsCopy, SupportsFreeSpace, SupportsPaths, SupportsSweep)


# The contract


class TestMemoryStorage(StorageContract):
    def make_storage(self) -> Storage:
        return MemoryStorage()


class TestLocalStorage(StorageContract):
    @pytest.fixture(autouse=True)
    def _use_folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    def make_storage(self) -> Storage:
        return LocalStorage(self.folder / "runs", new_owner())


class TestFsspecStorage(StorageContract):
    def make_storage(self) -> Storage:
        return FsspecStorage(f"memory://{uuid.uuid4().hex}/runs")


class TestCrashingStorage(TestLocalStorage):
    """If it never crashes, it works like its inner storage."""

    def make_storage(self) -> Storage:
        return CrashingStorage(super().make_storage(), at=0)


# The contract itself


class ShowsUploads(MemoryStorage):
    def upload(self, path: str) -> Any:
        self.write(path, b"")
        return super().upload(path)


class ListsByBeginning(MemoryStorage):
    def list(self, prefix: str = "") -> dict[str, Any]:
        return {name: stat for name, stat in super().list().items() if name.startswith(prefix)}


class Appends(MemoryStorage):
    def write(self, path: str, data: bytes) -> None:
        super().write(path, self._files.get(path, b"") + data)


class OneVersion(MemoryStorage):
    def list(self, prefix: str = "") -> dict[str, Any]:
        return {name: type(stat)(stat.size, "1") for name, stat in super().list(prefix).items()}


class KeepsQuietOnMissing(MemoryStorage):
    def open(self, path: str) -> Any:
        return super().open(path) if self._is_taken(path) else io.BytesIO()


class FailsOnDeletingTwice(MemoryStorage):
    def delete(self, path: str) -> None:
        if not self.list(path):
            raise FileNotFoundError(path)
        super().delete(path)


class ReplacesAlways(MemoryStorage):
    def _is_taken(self, path: str) -> bool:
        return False


class WritesThroughLinks(MemoryStorage):
    def write(self, path: str, data: bytes) -> None:
        super().write(self._resolve(path), data)


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (ShowsUploads, "test_an_upload_is_invisible_until_published"),
        (ListsByBeginning, "test_list_returns_files_below_a_prefix_with_their_size"),
        (Appends, "test_write_replaces_the_whole_file"),
        (OneVersion, "test_the_version_changes_whenever_a_file_is_rewritten"),
        (KeepsQuietOnMissing, "test_opening_what_is_missing_raises_file_not_found"),
        (FailsOnDeletingTwice, "test_delete_removes_a_file_or_folder_and_only_that"),
        (ReplacesAlways, "test_publish_refuses_a_taken_name_and_leaves_it"),
        (WritesThroughLinks, "test_writing_to_a_link_replaces_the_link"),
    ],
)
def test_contract_notices_a_broken_storage(broken: type[Storage], test: str) -> None:
    """Each of these storages breaks one promise, and the test of that promise fails."""

    class Broken(StorageContract):
        def make_storage(self) -> Storage:
            return broken()

    with pytest.raises((AssertionError, OSError), match=r"."):
        getattr(Broken(), test)()


def test_contract_asks_for_a_storage() -> None:
    """The error of a subclass without `make_storage` names the method."""
    with pytest.raises(NotImplementedError, match=r"must override make_storage\(\)"):
        StorageContract().test_an_empty_storage_lists_nothing()


def test_testing_exports_these_names() -> None:
    """The public names of `checkpointer.testing`."""
    assert ["Crash", "CrashingStorage", "FakeClock", "MemoryStorage", "StorageContract", "die"] == testing.__all__


def test_testing_needs_no_pytest() -> None:
    """It can be imported if pytest is not installed."""
    code = "import sys; sys.modules['pytest'] = None; import checkpointer.testing"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(testing.__file__).parents[2])


# LocalStorage


@pytest.fixture
def local(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "runs", new_owner())


def put(storage: Storage, path: str, data: bytes, *, replace: bool = False) -> None:
    upload = storage.upload(path)
    upload.write(data)
    upload.finish()
    upload.publish(replace=replace)


def staged(storage: LocalStorage) -> list[Path]:
    return [path for path in Path(str(storage), ".checkpointer/staging").rglob("*") if path.is_file()]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernel calls, in order: fsync of a file, fsync of a folder, and changes of names."""
    seen: list[str] = []

    def record(name: str, label: Callable[..., str]) -> None:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(label(*args))
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)

    record("fsync", lambda descriptor: "sync folder" if Path(f"/dev/fd/{descriptor}").is_dir() else "sync file")
    record("replace", lambda *_: "name")
    record("rename", lambda *_: "name")
    record("link", lambda *_: "name")
    record("unlink", lambda *_: "unname")
    return seen


def write(storage: LocalStorage) -> None:
    storage.write("a", b"1")


def publish_new(storage: LocalStorage) -> None:
    put(storage, "a", b"1")


def publish_over(storage: LocalStorage) -> None:
    put(storage, "there", b"1", replace=True)


def publish_staged(storage: LocalStorage) -> None:
    path, upload = storage.stage("a")
    Path(path).write_bytes(b"1")
    upload.finish()
    upload.publish(replace=False)


@pytest.mark.parametrize("act", [write, publish_new, publish_over, publish_staged])
def test_bytes_are_durable_before_their_name_and_the_name_before_the_return(
    local: LocalStorage, calls: list[str], act: Callable[[LocalStorage], None]
) -> None:
    """Otherwise a power loss leaves a name with half of its bytes, or an acknowledged save without a name."""
    local.write("there", b"0")
    calls.clear()

    act(local)

    assert ["sync file", "name", "sync folder"] == [call for call in calls if call != "unname"]


def test_each_new_folder_is_durable_before_a_file_is_named_in_it(local: LocalStorage, calls: list[str]) -> None:
    """If a power loss removes a folder, the files in it are lost."""
    local.prepare()
    calls.clear()

    local.write("a/b/c", b"1")

    assert ["sync file", "sync folder", "sync folder", "name", "sync folder"] == calls


def test_a_deletion_is_durable(local: LocalStorage, calls: list[str]) -> None:
    """A retired checkpoint does not reappear after a power loss."""
    local.write("a", b"1")
    local.write("tree/b", b"1")
    calls.clear()
    local.delete("a")
    assert ["unname", "sync folder"] == calls

    calls.clear()
    local.delete("tree")
    assert "sync folder" == calls[-1]


def test_a_staged_folder_is_durable_with_all_its_entries(local: LocalStorage, calls: list[str]) -> None:
    """Two files in two folders need four syncs."""
    path, upload = local.stage("tree")
    Path(path, "below").mkdir(parents=True)
    Path(path, "x").write_bytes(b"1")
    Path(path, "below", "y").write_bytes(b"1")
    calls.clear()

    upload.finish()

    assert ["sync file", "sync file", "sync folder", "sync folder"] == sorted(calls)


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.EMLINK, errno.EIO, errno.EACCES])
def test_without_hard_links_a_new_name_is_published_and_a_taken_one_refused(
    local: LocalStorage, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """FAT, some FUSE mounts and some network shares refuse links with different errors."""

    def link(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", link)
    put(local, "a", b"1")
    upload = local.upload("a")
    upload.write(b"2")
    upload.finish()
    with pytest.raises(NameTakenError, match="a appeared while it was about to be written; nothing was replaced"):
        upload.publish(replace=False)
    upload.abort()

    with local.open("a") as stream:
        assert b"1" == stream.read()
    assert [] == staged(local)
    with pytest.raises(OSError, match=os.strerror(code)):
        local.hardlink("a", "b")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_not_taken_for_a_disk_without_links(
    local: LocalStorage, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """The error of a link on a full disk is raised unchanged."""

    def link(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(OSError, match=os.strerror(code)):
        put(local, "a", b"1")

    assert {} == local.list()


@pytest.mark.parametrize("code", [errno.EIO, errno.EEXIST])
def test_a_link_whose_reply_was_lost_is_a_link(local: LocalStorage, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """If a network mount repeats its request, it gets an error because its first request has made the link."""
    make_link = os.link

    def link(source: Any, target: Any) -> None:
        make_link(source, target)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", link)
    put(local, "a", b"1")

    assert ["a"] == list(local.list())
    assert [] == staged(local)


def test_a_large_payload_whose_write_back_began_early_is_whole(local: LocalStorage) -> None:
    """Pieces below and above the buffer's size, and more of them than the kernel is asked to write back at a time."""
    pieces = [bytes([number]) * size for number, size in enumerate([1, 70_000, 5_000_000, 3, 9_000_001] * 3)]
    upload = local.upload("a.ckpt")
    for piece in pieces:
        assert len(piece) == upload.write(piece)
    upload.finish()
    upload.publish(replace=False)
    with local.open("a.ckpt") as stream:
        assert b"".join(pieces) == stream.read()


def begin(root: Path, owner: str) -> Upload:
    upload = LocalStorage(root, owner).upload("a")
    upload.write(b"unfinished")
    upload.finish()
    return upload


def test_sweep_removes_what_a_dead_owner_left(tmp_path: Path) -> None:
    """It returns their number; a second sweep finds nothing."""
    owner = new_owner()
    begin(tmp_path, owner)
    storage = LocalStorage(tmp_path, new_owner())
    assert 0 == storage.sweep()
    assert 1 == len(staged(storage))

    die(owner)

    assert 1 == storage.sweep()
    assert [] == staged(storage)
    assert 0 == storage.sweep()


def test_sweep_removes_what_a_killed_process_left(tmp_path: Path) -> None:
    """The files of a process are kept while it runs, and removed after ``kill -9``."""
    code = (
        "import sys, time\nfrom checkpointer.storage.owner import new_owner\n"
        "from checkpointer.storage import LocalStorage\n"
        "upload = LocalStorage(sys.argv[1], new_owner()).upload('a'); print('begun', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path(testing.__file__).parents[2]
    )
    storage = LocalStorage(tmp_path, new_owner())
    try:
        assert process.stdout is not None
        assert b"begun\n" == process.stdout.readline()
        assert 0 == storage.sweep()
        assert 1 == len(staged(storage))
    finally:
        process.kill()
        process.communicate()

    assert 1 == storage.sweep()
    assert [] == staged(storage)


def test_sweep_keeps_what_a_live_owner_writes(tmp_path: Path) -> None:
    """The age of its folder does not matter, because a large upload takes long."""
    upload = begin(tmp_path, new_owner())
    make_older(tmp_path, 48 * 3600)
    assert 0 == LocalStorage(tmp_path, new_owner()).sweep()

    upload.publish(replace=False)
    assert ["a"] == list(LocalStorage(tmp_path, new_owner()).list())


@pytest.mark.parametrize(("hours", "num_swept"), [(0, 0), (23, 0), (25, 1)])
@pytest.mark.parametrize("owner", [f"not-{socket.gethostname()}~1~2~abcdef", "no owner id"])
def test_sweep_waits_a_day_for_an_unknown_owner(tmp_path: Path, owner: str, hours: int, num_swept: int) -> None:
    """A process on another host cannot be checked from here."""
    begin(tmp_path, owner)
    make_older(tmp_path, hours * 3600)
    storage = LocalStorage(tmp_path, new_owner())

    assert num_swept == storage.sweep()
    assert 1 - num_swept == len(staged(storage))


def make_older(root: Path, seconds: float) -> None:
    for folder in (root / ".checkpointer/staging").iterdir():
        os.utime(folder, (time.time() - seconds,) * 2)


def test_close_removes_only_its_own_staging(tmp_path: Path) -> None:
    """Two storages of one owner have different staging folders."""
    owner = new_owner()
    one, other = LocalStorage(tmp_path, owner), LocalStorage(tmp_path, owner)
    uploads = [storage.upload("a") for storage in (one, other)]
    for upload in uploads:
        upload.finish()
    one.close()
    assert 1 == len(staged(other))
    other.close()

    assert not (tmp_path / ".checkpointer/staging").exists()


class FullDisk(LocalStorage):
    """Each staged file is a link to ``/dev/full``, where every write fails with ENOSPC."""

    def _new_staged(self) -> Path:
        path = super()._new_staged()
        path.symlink_to("/dev/full")
        return path


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("size", [10, 5 << 20])
def test_a_full_disk_is_an_os_error_and_abort_leaves_nothing(tmp_path: Path, size: int) -> None:
    """The error comes from `write` or from `finish`, depending on the buffer; the old file stays."""
    LocalStorage(tmp_path, new_owner()).write("a", b"old")
    storage = FullDisk(tmp_path, new_owner())
    upload = storage.upload("a")
    with pytest.raises(OSError, match="No space left") as caught:
        write_and_finish(upload, b"x" * size)
    upload.abort()
    assert errno.ENOSPC == caught.value.errno
    assert [] == [path for path in (tmp_path / ".checkpointer/staging").rglob("*") if path.is_symlink()]

    with pytest.raises(OSError, match="No space left"):
        storage.write("a", b"x" * size)
    assert [] == [path for path in (tmp_path / ".checkpointer/staging").rglob("*") if path.is_symlink()]
    assert b"old" == (tmp_path / "a").read_bytes()


def write_and_finish(upload: Upload, data: bytes) -> None:
    upload.write(data)
    upload.finish()


@contextlib.contextmanager
def no_privileges() -> Iterator[None]:
    """Run as an ordinary user, because permissions do not apply to root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def read_only() -> Iterator[Path]:
    # It is not below tmp_path, because only the owner may enter that.
    folder = Path(tempfile.mkdtemp())
    (folder / "a").write_bytes(b"1")
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no POSIX permissions")
def test_a_read_only_directory_fails_in_prepare_and_can_be_read(read_only: Path) -> None:
    """The message names its owner and mode, and says what to do; reading from it works."""
    storage = LocalStorage(read_only, new_owner())
    advice = rf"{read_only} belongs to .*\(uid {os.geteuid()}\) with mode dr-xr-xr-x.*chown"
    with no_privileges():
        with pytest.raises(StorageError, match=f"cannot write to {read_only}: Permission denied; {advice}"):
            storage.prepare()
        assert 0 == storage.sweep()
        storage.close()
        assert ["a"] == list(storage.list())
        with storage.open("a") as stream:
            assert b"1" == stream.read()


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no POSIX permissions")
def test_a_directory_without_permission_is_shown_with_its_owner_and_mode(read_only: Path) -> None:
    """The error of each caller has it, a failed save included; it does not mention credentials or a network."""
    (read_only / "closed").mkdir()
    manager = CheckpointManager(read_only / "closed", Policy(EverySteps(1), [KeepLast(1)]), state=dict)
    (read_only / "closed").chmod(0o000)
    advice = rf"{read_only}/closed belongs to .*\(uid {os.geteuid()}\) with mode d---------.*chown"
    with no_privileges():
        with pytest.raises(StorageError, match=f"cannot use .*; {advice}"):
            CheckpointManager(read_only / "closed")
        with pytest.raises(StorageError, match=f"cannot use .*; {advice}"):
            CheckpointManager(read_only / "closed" / "run")
        with pytest.raises(StorageError, match=f"cannot read .*; {advice}"):
            look_at(LocalStorage(read_only / "closed", new_owner()))
        with pytest.raises(SaveError, match=f"was not saved .*; {advice}"):
            manager.observe({}, step=1, epoch=0)
    (read_only / "closed").chmod(0o755)
    manager.close()


def test_a_file_is_not_a_directory(tmp_path: Path) -> None:
    """It cannot be the root or a parent of the root."""
    (tmp_path / "file").write_bytes(b"1")
    with pytest.raises(StorageError, match="file is a file; the manager needs a folder"):
        LocalStorage(tmp_path / "file", new_owner())
    with pytest.raises(StorageError, match=r"cannot write to .*: Not a directory; choose"):
        LocalStorage(tmp_path / "file/runs", new_owner()).prepare()

    assert b"1" == (tmp_path / "file").read_bytes()


def test_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell does not expand it inside quotes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    for directory in ("~/runs", Path("~/runs")):
        storage = open_storage(directory, new_owner())
        storage.write("a", b"1")
        assert str(tmp_path / "runs") == str(storage)

    assert {"runs"} == set(os.listdir(tmp_path))


def test_a_moved_directory_keeps_its_links(local: LocalStorage, tmp_path: Path) -> None:
    """The links are relative."""
    local.write("deep/a", b"1")
    local.symlink("deep/a", "last")
    local.symlink("deep/a", "other/last")
    os.rename(tmp_path / "runs", tmp_path / "moved")

    assert b"1" == (tmp_path / "moved/last").read_bytes() == (tmp_path / "moved/other/last").read_bytes()


def test_unfinished_writes_are_not_listed_even_when_asked_for(local: LocalStorage) -> None:
    """They are hidden for every prefix."""
    upload = local.upload("a")
    upload.write(b"1")
    upload.finish()

    assert 1 == len(staged(local))
    for prefix in ("", ".checkpointer", ".checkpointer/staging", ".checkpointer/staging/x"):
        assert {} == local.list(prefix)


def test_deleting_the_last_file_of_a_folder_removes_the_folder_but_never_the_root(local: LocalStorage) -> None:
    """A folder with a file of another program stays too."""
    root = Path(str(local))
    for name in ("a/b/c", "d/e/f", "d/theirs"):
        local.write(name, b"1")
    for name in ("a/b/c", "d/e/f"):
        local.delete(name)
    assert {".checkpointer", "d"} == set(os.listdir(root))
    assert ["theirs"] == os.listdir(root / "d")

    local.close()
    local.delete("d")
    assert root.is_dir()


# Fsspec and open_storage


def test_the_root_of_a_filesystem_is_a_storage_too() -> None:
    """Paths stay complete if the root has no parent."""
    name = uuid.uuid4().hex
    storage = FsspecStorage("memory://")
    storage.write(f"{name}/a", b"1")

    assert {f"{name}/a"} == set(storage.list(name))
    assert f"{name}/a" in storage.list()
    storage.delete(name)


def test_an_unknown_protocol_says_what_to_install() -> None:
    """The error comes before the training starts."""
    with pytest.raises(StorageError, match=r"no driver for nosuch:// .*; install it"):
        open_storage("nosuch://bucket", new_owner())


def test_a_chain_of_filesystems_is_refused_by_its_name() -> None:
    """There is no driver to install. Its secrets are not shown."""
    with pytest.raises(StorageError, match=r"is a chain of filesystems \(::\).*; pass .*'sftp://host/run'") as error:
        open_storage("filecache::sftp://me:hunter2@host/run", new_owner())
    assert "hunter2" not in str(error.value)


def test_an_object_with_a_url_for_text_is_refused_with_that_url() -> None:
    """A `UPath` has options of its own, which a text does not say."""

    class Upath:
        def __str__(self) -> str:
            return "memory://bucket/run"

    with pytest.raises(StorageError, match=r"pass its URL, 'memory://bucket/run', and storage_options="):
        open_storage(Upath(), new_owner())  # type: ignore[arg-type]


def test_open_storage_takes_paths_urls_storages_and_none(tmp_path: Path) -> None:
    """It refuses other values."""
    mine = MemoryStorage()
    assert mine is open_storage(mine, "me")
    assert isinstance(open_storage(None, "me"), MemoryStorage)
    assert isinstance(open_storage("memory://runs", "me"), FsspecStorage)
    assert str(tmp_path) == str(open_storage(f"file://{tmp_path}", "me")) == str(open_storage(tmp_path, "me"))
    with pytest.raises(StorageError, match="the directory is ''; name a folder"):
        open_storage("", "me")
    with pytest.raises(StorageError, match="the directory is 3; expected a path"):
        open_storage(3, "me")  # type: ignore[arg-type]


# CrashingStorage


def test_crash_is_not_an_exception() -> None:
    """``except Exception`` must not catch the death of its process."""
    assert not issubclass(Crash, Exception)


@pytest.mark.parametrize("make", [MemoryStorage, lambda: FsspecStorage("memory://ports")])
def test_crashing_storage_supports_what_the_storage_inside_does(make: Callable[[], Storage]) -> None:
    """`isinstance` agrees, which looks up attributes statically since Python 3.12."""
    inner = make()
    outer = CrashingStorage(inner)
    twice = CrashingStorage(outer)

    assert isinstance(outer, Storage)
    for port in PORTS:
        assert isinstance(inner, port) == isinstance(outer, port) == isinstance(twice, port), port
        for name in (name for name in vars(port) if not name.startswith("_")):
            has = inspect.getattr_static(outer, name, None) is not None
            assert has == hasattr(outer, name) == hasattr(inner, name), name
    assert str(inner) == str(outer)


def test_crashing_storage_supports_all_that_a_disk_does(local: LocalStorage) -> None:
    """A disk supports links, free space, paths and sweeping, but not copying."""
    assert [SupportsLinks, SupportsFreeSpace, SupportsPaths, SupportsSweep] == [
        port for port in PORTS if isinstance(CrashingStorage(local), port)
    ]


def everything(storage: Storage) -> None:
    """Make one operation of each kind, and two uploads; the numbers are positions in `WHAT`."""
    assert isinstance(storage, SupportsSweep)
    assert isinstance(storage, SupportsLinks)
    assert isinstance(storage, SupportsPaths)
    storage.prepare()  # 1
    storage.sweep()  # 2
    upload = storage.upload("a")  # 3
    try:
        upload.write(b"12345678")  # 4
        upload.finish()  # 5
        storage.write("record", b"1")  # 6
        upload.publish(replace=False)  # 7
    finally:
        upload.abort()
    storage.list()  # 8
    storage.open("a").close()  # 9
    storage.symlink("a", "soft")  # 10
    storage.hardlink("a", "hard")  # 11
    storage.sync("a")  # 12
    storage.delete("record")  # 13
    path, staged_upload = storage.stage("b")  # 14
    Path(path).write_bytes(b"22")
    staged_upload.finish()  # 15
    staged_upload.publish(replace=False)  # 16
    storage.close()


WHAT = [
    *("prepare", "sweep", "upload", "upload.write", "finish", "write", "publish", "list"),
    *("open", "symlink", "hardlink", "sync", "delete", "stage", "finish", "publish"),
]


def test_operations_are_counted_and_none_is_fatal_at_zero(local: LocalStorage) -> None:
    """A test can find out how many operations it can die at."""
    storage = CrashingStorage(local, at=0)
    everything(storage)

    assert len(WHAT) == storage.operations
    assert not storage.is_dead
    assert {"a": 8, "b": 2, "hard": 8} == {n: s.size for n, s in local.list().items() if n != "soft"}


@pytest.mark.parametrize("when", ["before", "halfway", "after"])
@pytest.mark.parametrize(("at", "what"), list(enumerate(WHAT, start=1)))
def test_each_operation_can_be_the_last(
    local: LocalStorage, at: int, what: str, when: Literal["before", "halfway", "after"]
) -> None:
    """The effect happens or not, as chosen. No later operation happens. Staged files stay, unpublished."""
    storage = CrashingStorage(local, at=at, when=when)
    with pytest.raises(Crash) as caught:
        everything(storage)
    left = {*local.list()}
    errors = [caught.value, caught.value.__context__]
    assert f"operation {at} ({what}), {when}" in map(str, errors)
    assert at == storage.operations
    assert storage.is_dead

    done = at if when != "before" else at - 1
    expected = {"a": 7, "soft": 10, "hard": 11, "b": 16}
    expected_left = {name for name, since in expected.items() if done >= since}
    assert expected_left | ({"record"} if 6 <= done < 13 else set()) == left
    assert (3 <= done < 7) == any(path.suffix == "" for path in staged(local) if path.stat().st_size != 2)


def test_halfway_through_an_upload_half_of_the_data_is_staged(local: LocalStorage) -> None:
    """Half is counted in bytes, also if items are larger than a byte."""
    storage = CrashingStorage(local, at=3, when="halfway")
    upload = storage.upload("a")
    upload.write(b"1234")
    with pytest.raises(Crash, match=r"operation 3 \(upload.write\), halfway"):
        upload.write(memoryview(b"56789abc").cast("I"))

    (path,) = staged(local)
    assert b"12345678" == path.read_bytes()


def test_halfway_through_deleting_a_folder_half_of_its_files_are_gone() -> None:
    """A file is deleted in one step."""
    inner = MemoryStorage()
    for name in ("file", "tree/a", "tree/b", "tree/c/d", "tree/e"):
        inner.write(name, b"1")
    with pytest.raises(Crash, match="halfway"):
        CrashingStorage(inner, at=1, when="halfway").delete("tree")
    assert ["file", "tree/c/d", "tree/e"] == sorted(inner.list())

    with pytest.raises(Crash, match="halfway"):
        CrashingStorage(inner, at=1, when="halfway").delete("file")
    assert ["tree/c/d", "tree/e"] == sorted(inner.list())


def test_halfway_through_copying_a_folder_half_of_its_files_are_there() -> None:
    """The former files of the target are deleted."""
    inner = FsspecStorage(f"memory://{uuid.uuid4().hex}")
    for name in ("a/x", "a/y", "b/old"):
        inner.write(name, b"1")
    storage: Storage = CrashingStorage(inner, at=1, when="halfway")
    assert isinstance(storage, SupportsCopy)
    with pytest.raises(Crash, match=r"operation 1 \(copy\), halfway"):
        storage.copy("a", "b")

    assert ["a/x", "a/y", "b/x"] == sorted(inner.list())


def test_a_dead_process_does_nothing(local: LocalStorage) -> None:
    """A dead process does not clean up."""
    storage: Storage = CrashingStorage(local, at=2, when="after")
    upload = storage.upload("a")
    with pytest.raises(Crash, match=r"operation 2 \(upload.write\), after"):
        upload.write(b"1")
    assert isinstance(storage, SupportsSweep)
    assert isinstance(storage, SupportsFreeSpace)
    assert isinstance(storage, SupportsPaths)
    attempts: list[Callable[[], object]] = [
        upload.abort,
        upload.finish,
        lambda: upload.publish(replace=True),
        lambda: storage.write("b", b"1"),
        storage.list,
        storage.close,
        storage.free_space,
        lambda: storage.local_path("a"),
    ]
    for attempt in attempts:
        with pytest.raises(Crash, match="dead since operation 2"):
            attempt()

    assert {} == local.list()
    assert [b"1"] == [path.read_bytes() for path in staged(local)]


def test_a_dead_process_holds_no_files_open(local: LocalStorage) -> None:
    """A test that crashes hundreds of times must not use up descriptors or cause a ResourceWarning."""
    storage = CrashingStorage(local, at=3)
    upload = storage.upload("a")
    upload.write(b"1")
    with pytest.raises(Crash, match="write"):
        storage.write("b", b"1")
    del upload, storage
    gc.collect()

    assert 1 == len(staged(local))


def test_an_operation_that_fails_can_be_the_last_too() -> None:
    """A dead process reports no error."""
    inner = MemoryStorage()
    inner.write("a", b"theirs")
    upload = CrashingStorage(inner, at=3, when="after").upload("a")
    upload.finish()
    with pytest.raises(Crash, match="publish"):
        upload.publish(replace=False)

    assert b"theirs" == inner.open("a").read()


@pytest.mark.parametrize(("at", "when"), [(-1, "before"), (1, "sometimes")])
def test_crashing_storage_refuses_wrong_arguments(at: int, when: Any) -> None:
    """The error has the expected values."""
    with pytest.raises(ValueError, match="expected at >= 0"):
        CrashingStorage(MemoryStorage(), at=at, when=when)


# FakeClock and die


def test_fake_clock_moves_only_by_advance() -> None:
    """It never moves back."""
    clock = FakeClock()
    assert 0.0 == clock.time() == clock.time()
    clock.advance(1.5)
    clock.advance(0)
    assert 1.5 == clock.time()
    for seconds in (-1, float("nan")):
        with pytest.raises(ValueError, match="a clock does not go back"):
            clock.advance(seconds)


def test_die_makes_an_owner_dead() -> None:
    """A second call does nothing."""
    owner = new_owner()
    assert is_live(owner)
    die(owner)
    die(owner)
    assert is_dead(owner)


class CloudPath(PurePosixPath):
    """A path as cloudpathlib has them: its text is a URL, and `os.fspath` names its cache on this disk."""

    def __str__(self) -> str:
        return "s3://bucket/runs"

    def __fspath__(self) -> str:
        return "/cache/bucket/runs"


def test_a_path_that_is_a_cache_of_a_url_is_refused() -> None:
    """What is saved in a cache is never uploaded, and cloudpathlib removes it at the end of the process."""
    with pytest.raises(StorageError, match="its path is a cache on this disk; pass its URL, 's3://bucket/runs'"):
        open_storage(CloudPath(), "owner")
