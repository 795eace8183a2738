"""The storage contract, and special cases, on filesystems that are really mounted."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from support import mounts
from support.fault_me import FOREIGN, Run, check_survivor, policy_of
from support.plain_format import PlainFormat

from checkpointer import CheckpointerWarning, CheckpointManager, EverySteps, KeepAll, KeepLast, Naming, Policy
from checkpointer.commit.index import record_path
from checkpointer.errors import SaveError, StorageError
from checkpointer.ports import Storage
from checkpointer.storage import LocalStorage
from checkpointer.storage.owner import new_owner
from checkpointer.testing import StorageContract

pytestmark = pytest.mark.slow

EVERY = EverySteps(1)
MOUNTS: dict[str, mounts.Mount] = {
    "tmpfs": mounts.tmpfs,
    "ext4": mounts.ext4,
    "xfs": mounts.xfs,
    "no chmod": mounts.no_chmod,
    "exfat": mounts.exfat,
    "ntfs": mounts.ntfs,
}


# The contract


class OnMount(StorageContract):
    """The contract below a mount point; each storage of a test has its own folder."""

    mount: Callable[[Path], contextlib.AbstractContextManager[Path]]

    @pytest.fixture(autouse=True)
    def _mounted(self, tmp_path: Path) -> Iterator[None]:
        with type(self).mount(tmp_path) as self.disk:
            yield

    def make_storage(self) -> Storage:
        return LocalStorage(self.disk / f"runs-{new_owner()[-6:]}", new_owner())


class TestTmpfs(OnMount):
    mount = staticmethod(mounts.tmpfs)


class TestExt4(OnMount):
    mount = staticmethod(mounts.ext4)


class TestXfs(OnMount):
    mount = staticmethod(mounts.xfs)


class TestRefusingChmod(OnMount):
    mount = staticmethod(mounts.no_chmod)


class TestNtfs(OnMount):
    mount = staticmethod(mounts.ntfs)


class TestExfat(OnMount):
    mount = staticmethod(mounts.exfat)

    def test_any_name_can_be_written_published_listed_read_and_deleted(self) -> None:
        """exFAT refuses some names: the error says so, and no file is left."""
        storage = self.make_storage()
        for name in ("with space.ckpt", "größe-模型-🚀.ckpt", "n" * 240, "hash#percent%20.ckpt", "a/b/deep.ckpt"):
            storage.write(name, b"1")
            assert {name} == set(storage.list())
            storage.delete(name)
        for name in ("star*.ckpt", "which?.ckpt", "colon:.ckpt"):
            with pytest.raises(OSError, match="takes no such name; change the template"):
                storage.write(name, b"1")
            upload = storage.upload(name)
            upload.finish()
            with pytest.raises(OSError, match="takes no such name; change the template"):
                upload.publish(replace=False)
            upload.abort()
        assert {} == dict(storage.list())

    def test_links_are_refused_and_leave_nothing(self) -> None:
        """The port allows an `OSError` if links are impossible."""
        storage = self.make_storage()
        assert isinstance(storage, LocalStorage)
        storage.write("a", b"1")
        storage.write("link", b"2")
        for make in (storage.symlink, storage.hardlink):
            with pytest.raises(OSError, match=r"Function not implemented|Operation not permitted"):
                make("a", "link")
        assert {"a", "link"} == set(storage.list())

    # These tests need links.
    test_a_symlink_follows_its_target = None  # type: ignore[assignment]
    test_a_hard_link_survives_what_happens_to_its_target = None  # type: ignore[assignment]
    test_links_swing_over_what_is_there = None  # type: ignore[assignment]
    test_writing_to_a_link_replaces_the_link = None  # type: ignore[assignment]
    test_a_link_takes_its_name = None  # type: ignore[assignment]
    test_deleting_a_link_keeps_its_target = None  # type: ignore[assignment]
    test_listing_does_not_follow_links = None  # type: ignore[assignment]


# The manager


@pytest.fixture
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A mounted filesystem, by its name in `MOUNTS`."""
    with MOUNTS[request.param](tmp_path) as path:
        yield path


def on(*kinds: str) -> pytest.MarkDecorator:
    """Run the test on each of these filesystems."""
    return pytest.mark.parametrize("disk", kinds, indirect=True)


@on(*MOUNTS)
def test_the_capabilities_of_a_filesystem_are_probed(disk: Path, request: pytest.FixtureRequest) -> None:
    """Without links, a claim refuses a taken name."""
    links = ("link, refused by the filesystem", "hard link", "symlink")
    none = ("rename, under a claim", "through this process", "none")
    found = LocalStorage(disk, new_owner()).capabilities()

    expected = none if "exfat" in request.node.callspec.id else links
    assert expected == (found["create"], found["copy"], found["link"])
    assert "rename" == found["replace"]


@on(*MOUNTS)
@pytest.mark.parametrize("last", ["link", "copy"])
def test_aliases_name_the_newest_and_best_whatever_links_there_are(disk: Path, last: Literal["link", "copy"]) -> None:
    """An alias is a symlink, hard link or copy; after each save it has the content of its checkpoint."""
    folder = disk / "run"
    folder.mkdir()
    (folder / FOREIGN).write_bytes(b"mine")
    run = Run(folder, policy_of(last))
    for step in range(1, 7):
        assert run.observe(step)
        assert f'{{"step": {step},'.encode() == (folder / "last.ckpt").read_bytes()[: 10 + len(str(step))]
        assert run.manager.best is not None
        assert (folder / run.manager.best.name).read_bytes() == (folder / "best.ckpt").read_bytes()
    run.manager.close()
    check_survivor(folder, range(1, 7), policy_of(last))


@on(*MOUNTS)
def test_folder_that_a_trainer_writes_is_published_whole(disk: Path) -> None:
    """A folder is never replaced, whether the filesystem raises ENOTEMPTY or EEXIST."""
    (disk / "model.d").mkdir()
    (disk / "model.d/theirs").write_bytes(b"mine")

    def save(path: str) -> None:
        os.makedirs(os.path.join(path, "deep"))
        Path(path, "deep/weights").write_bytes(b"weights")

    naming = Naming("model", extension=".d", version_counter=False)
    policy = Policy(EVERY, [KeepLast(2)], name=naming, last="link")
    with CheckpointManager(disk, policy, save=save) as manager, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1, 5):
            assert manager.observe({}, step=step, epoch=0)
        assert [3, 4] == [record.step for record in manager.records]
        for record in manager.records:
            assert b"weights" == (disk / record.name / "deep/weights").read_bytes()
    assert b"mine" == (disk / "model.d/theirs").read_bytes()
    # Without links a folder has no alias, and a warning says so.
    assert (disk / "last.d/deep/weights").exists() or 4 == len(caught)
    assert all("the alias last.d could not be made" in str(warning.message) for warning in caught)


@on("tmpfs", "ext4", "xfs", "exfat")
def test_folder_never_replaces_a_folder_that_is_not_empty(disk: Path) -> None:
    """Replacing it raises the filesystem's error; without ``replace`` the name counts as taken."""
    storage = LocalStorage(disk / "run", new_owner())
    storage.write("tree/old", b"1")
    path, upload = storage.stage("tree")
    Path(path).mkdir()
    Path(path, "new").write_bytes(b"2")
    upload.finish()
    with pytest.raises(OSError, match=r".") as caught:
        upload.publish(replace=True)
    assert caught.value.errno in (errno.ENOTEMPTY, errno.EEXIST)
    with pytest.raises(FileExistsError, match="nothing was replaced"):
        upload.publish(replace=False)
    upload.abort()
    assert {"tree/old"} == set(storage.list())


def test_read_only_directory_is_an_error_for_a_writer_and_none_for_a_reader(tmp_path: Path) -> None:
    """The error comes at construction, not at the first save."""
    run = Run(tmp_path / "run", policy_of())
    run.observe(1)
    run.manager.close()
    with mounts.read_only(tmp_path / "run", tmp_path) as folder:
        with pytest.raises(StorageError, match=f"cannot write to {folder}: Read-only file system; choose a directory"):
            Run(folder, policy_of())
        reader = CheckpointManager(folder, format=PlainFormat())
        restored = reader.restore()
        assert restored is not None
        assert 1 == restored.state["step"]
        reader.close()


def test_mount_that_refuses_every_rename_is_an_error_that_costs_nothing(tmp_path: Path) -> None:
    """Nothing is committed, and no file is left."""
    with mounts.bindfs(tmp_path, "--rename-deny") as folder:
        refused = f"cannot write to {folder}: Operation not permitted; choose a directory"
        with pytest.raises(StorageError, match=refused):
            Run(folder, policy_of())
    assert [] == [path for path in (tmp_path / "source").rglob("*") if path.is_file()]


LONG = "größe 模型 " + "n" * (255 - len("größe 模型 -1.ckpt".encode()))


@on("tmpfs", "ext4", "xfs", "no chmod")
@pytest.mark.parametrize(
    "template", ["with space {step}", "größe-模型-🚀-{step}", LONG + "-{step}", "é" * 120 + "/{step}"]
)
def test_any_name_that_the_filesystem_takes_can_be_saved_found_and_retired(disk: Path, template: str) -> None:
    """Names have spaces, other alphabets and 255 bytes; aliases too."""
    name = Naming(template, auto_insert=False, last="l" * 250, best="b" * 250)
    policy = Policy(EVERY, [KeepLast(2)], name=name, last="link")
    folder = disk / "a run"
    for step in range(1, 5):
        run = Run(folder, policy)
        assert step == 1 or step - 1 == run.manager.restore().step  # type: ignore[union-attr]
        decision = run.observe(step)
        assert f"{template.format(step=step)}.ckpt" == decision.name
        run.manager.pin(decision.name)
        run.manager.unpin(decision.name)
        run.manager.close()
    reader = CheckpointManager(folder, policy, format=PlainFormat())
    assert [3, 4] == [record.step for record in reader.records]
    assert 2 == len([p for p in folder.rglob("*.ckpt") if ".checkpointer" not in p.parts and not p.is_symlink()])
    assert 2 == len(list((folder / ".checkpointer/records").rglob("*.json")))
    assert b'{"step": 4' == (folder / name.last_file).read_bytes()[:10]


def test_record_of_a_long_name_lies_under_a_short_one_that_no_other_has() -> None:
    """A part has at most 255 bytes and a readable start; names that differ only at the end get different paths."""
    long = ["x" * 254 + end for end in "abc"] + ["é" * 127, "a/" + "模" * 85]
    paths = [record_path(name) for name in long]
    assert len(paths) == len({*paths})
    assert all(len(part.encode()) <= 255 for path in paths for part in path.split("/"))
    assert all(path.endswith(".json") for path in paths)
    assert ".checkpointer/records/" + "x" * 250 + ".json" == record_path("x" * 250)
    assert paths[-1].startswith(".checkpointer/records/a/模模")


def test_relative_directory_and_home_are_fixed_when_the_manager_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later ``chdir`` or another ``HOME`` has no effect."""
    for name in ("here", "elsewhere", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    runs = [Run(name, policy_of()) for name in ("runs/a", "~/runs/b")]
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path / "elsewhere"))
    for run in runs:
        run.observe(1)
        run.manager.close()
    assert (tmp_path / "here/runs/a/last.ckpt").exists()
    assert (tmp_path / "home/runs/b/last.ckpt").exists()
    assert [] == list((tmp_path / "elsewhere").iterdir())


@on("exfat", "ext4")
def test_names_that_differ_only_by_case_lose_nothing(disk: Path) -> None:
    """If the filesystem ignores case, the second gets a version. Files of other programs keep their content."""
    (disk / "LAST.ckpt").write_bytes(b"mine")
    (disk / "Model-1.ckpt").write_bytes(b"mine")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointerWarning)
        runs = []
        for name, last in (("model", "last"), ("MODEL", "newest"), ("mOdEl", "Newest-2")):
            naming = Naming(name + "-{step}", auto_insert=False, last=last)
            runs.append(Run(disk, Policy(EVERY, [KeepAll()], name=naming, last="copy"), label=name))
        for step in (1, 2):
            for run in runs:
                assert run.observe(step)
    for run in runs:
        assert [1, 2] == [record.step for record in run.manager.records]
        for record in run.manager.records:
            restored = run.manager.restore(record.name)
            assert restored is not None
            assert record.step == restored.state["step"]
        run.manager.close()
    assert b"mine" == (disk / "LAST.ckpt").read_bytes() == (disk / "Model-1.ckpt").read_bytes()


@on("exfat")
def test_alias_is_not_put_over_the_slot_of_another_that_differs_by_case(disk: Path) -> None:
    """The slot is a checkpoint, so its name is taken in upper and lower case."""
    first = Run(disk, policy_of("copy"), label="a")
    for step in (1, 2, 3, 4):
        first.observe(step)
    assert "last.ckpt" in [record.name for record in first.manager.records]
    first.manager.close()
    policy = Policy(EVERY, [KeepLast(1)], name=Naming(last="LAST", best="BEST"), last="copy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointerWarning)
        second = Run(disk, policy, label="b")
        with contextlib.suppress(SaveError):
            second.observe(1)
        second.manager.close()
        again = Run(disk, policy_of("copy"), label="a")
        assert 4 == again.manager.restore().step  # type: ignore[union-attr]
        again.manager.close()


@pytest.mark.parametrize("format", ["torch", "safetensors"])
@pytest.mark.parametrize("temporary", ["full", "missing"])
def test_temporary_directory_is_never_used_for_a_payload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, temporary: str
) -> None:
    """A payload of 4 MB is saved and restored while TMPDIR has 64 KiB, or does not exist."""
    if format == "safetensors":
        pytest.importorskip("safetensors")
    with mounts.tmpfs(tmp_path, 64 << 10) as tiny:
        where = tiny if temporary == "full" else tmp_path / "missing"
        for name in ("TMPDIR", "TEMP", "TMP"):
            monkeypatch.setenv(name, str(where))
        monkeypatch.setattr("tempfile.tempdir", None)
        weights = {"w": torch.arange(1_000_000, dtype=torch.float32)}
        policy = Policy(EVERY, [KeepLast(1)], last="copy", contents="weights")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CheckpointerWarning)
            manager = CheckpointManager(tmp_path / "run", policy, state=lambda: weights, format=format)
        for step in (1, 2):
            assert manager.observe({}, step=step, epoch=0)
        restored = manager.restore(contents="any")
        assert restored is not None
        assert torch.equal(weights["w"], restored.state["w"])
        manager.close()
        assert [] == list(tiny.iterdir())
        assert shutil.disk_usage(tiny).free == shutil.disk_usage(tiny).total
