"""Files of an odd kind in ``.checkpointer``, and folders of other users: foreign, named and left, never an error."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.commands import command, train
from support.users import forbid, ordinary_user

from checkpointer import CheckpointerWarning, CheckpointManager, EverySteps, KeepAll, KeepBest, KeepLast, Policy
from checkpointer.commit.changes import CHANGES
from checkpointer.commit.index import RECORDS, load
from checkpointer.commit.terms import TERMS, key_of
from checkpointer.commit.writer_marks import WRITERS
from checkpointer.errors import RecordError, StorageError
from checkpointer.records.record import Entry
from checkpointer.storage import LocalStorage, open_storage
from checkpointer.storage.owner import STAGING, new_owner, release
from checkpointer.storage.remote import FsspecStorage
from checkpointer.storage.unreadable import UNREADABLE
from checkpointer.tools.catalog import look_at

ALL = Policy(EverySteps(1), [KeepAll()])
ALIASED = Policy(EverySteps(1), [KeepLast(2), KeepBest(1, "loss", mode="min")], last="link", best="copy")
DEAD = "node7_1234abcd_99~17~5~0123456789ab"


def file(path: Path) -> None:
    path.write_bytes(b"{}")


def full_folder(path: Path) -> None:
    path.mkdir()
    (path / "x.json").write_bytes(b"{}")


def empty_folder(path: Path) -> None:
    path.mkdir()


def link_to_folder(path: Path) -> None:
    run = next(above.parent for above in path.parents if above.name == ".checkpointer")
    elsewhere = run.with_name("elsewhere")
    elsewhere.mkdir(exist_ok=True)
    (elsewhere / "precious").write_bytes(b"1")
    path.symlink_to(elsewhere)


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def others_file(path: Path) -> None:
    file(path)
    forbid(path)


def others_folder(path: Path) -> None:
    full_folder(path)
    forbid(path)


KINDS = (file, full_folder, empty_folder, link_to_folder, link_to_itself, pipe, others_file, others_folder)
PLACES = (
    f"{STAGING}/{DEAD}-12345678",
    f"{STAGING}/claim-0123456789abcdef0123456789abcdef",
    f"{RECORDS}/epoch=0-step=10.ckpt.json",
    f"{RECORDS}/other.ckpt.json",
    f"{CHANGES}/{DEAD}.json",
    f"{WRITERS}/{DEAD}.json",
    f"{TERMS}/{key_of('run', '')}/1.json",
    f"{TERMS}/{key_of('run', '')}/1.end",
    f"{TERMS}/{key_of('run', '')}/1.limits",
    ".checkpointer/aliases/last.ckpt.json",
    ".checkpointer/index.json",
    ".checkpointer/directory.json",
    ".checkpointer/odd",
)


@pytest.fixture(scope="module", autouse=True)
def _imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Import all that a command needs: an ordinary user may not read this Python's own folder."""
    run = train(tmp_path_factory.mktemp("warm") / "run", 0.5)
    for argv in (("ls",), ("last",), ("verify",), ("sweep",), ("copy", run.with_name("copy")), ("adopt",)):
        command(argv[0], run, *argv[1:])
    command("ls", run.with_name("nothing"))


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory, in which this process has no privileges."""
    with ordinary_user() as folder:
        yield folder


@contextlib.contextmanager
def ignored() -> Iterator[None]:
    """Let the warnings pass that name what is damaged, and an alias that gets another name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointerWarning)
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_no_odd_file_stops_the_manager_or_a_command(folder: Path, kind: Callable[[Path], None]) -> None:
    """At every place at once a manager saves and restores, and every command that looks ends with 0 or 1."""
    run = folder / "run"
    for place in PLACES:
        (run / place).parent.mkdir(parents=True, exist_ok=True)
        kind(run / place)
    with ignored(), CheckpointManager(run, ALIASED, state=lambda: {"w": 1}, lease_s=0.1) as manager:
        assert manager.observe({"loss": 1.0}, step=10, epoch=0)
        assert manager.observe({"loss": 0.5}, step=20, epoch=1)
    with ignored(), CheckpointManager(run, ALL, state=dict, run="run", lease_s=0.1) as manager:
        assert manager.observe({}, step=30, epoch=2)
    with ignored(), CheckpointManager(run, ALIASED, state=dict, lease_s=0.1) as manager:
        restored = manager.restore()
        assert restored is not None
        assert 30 == restored.step
    for argv in (("ls", run), ("last", run), ("verify", run), ("sweep", run), ("copy", run, folder / "copy")):
        said = command(*argv)
        assert said.code in (0, 1), (argv, said)
    for place in PLACES:
        assert os.path.lexists(run / place), place


@pytest.mark.parametrize("name", ["file", "full_folder", "link_to_folder", "link_to_itself", "others_folder"])
def test_an_odd_entry_of_the_staging_folder_is_left_by_sweep(folder: Path, name: str) -> None:
    """It is neither removed nor followed, and what dead writers left beside it is removed."""
    kind = next(kind for kind in KINDS if kind.__name__ == name)
    staging = folder / "run" / STAGING
    dead = staging / f"{new_owner()}-12345678"
    release(dead.name[:-9])
    (dead / "unfinished").mkdir(parents=True)
    kind(staging / "claim-0123456789abcdef0123456789abcdef")
    assert 1 == LocalStorage(folder / "run", new_owner()).sweep()
    assert not dead.exists()
    assert os.path.lexists(staging / "claim-0123456789abcdef0123456789abcdef")
    assert name != "link_to_folder" or (folder / "elsewhere/precious").exists()


def test_a_record_of_another_user_is_named_and_its_checkpoint_is_left(folder: Path) -> None:
    """The other checkpoints count; the directory is not lost for one file."""
    train(folder / "run", 0.5, 0.4, policy=ALL)
    path = folder / "run" / RECORDS / "epoch=0-step=10.ckpt.json"
    (folder / "run/.checkpointer/index.json").unlink()  # It has a copy of the record.
    forbid(path)
    said = command("ls", folder / "run")
    assert 1 == said.code
    assert f"damaged: {RECORDS}/{path.name} cannot be read, because this process lacks the permission" in said.err
    with CheckpointManager(folder / "run", Policy(EverySteps(1), [KeepLast(1)]), state=dict) as manager:
        with pytest.warns(CheckpointerWarning, match="cannot be read, because"):
            restored = manager.restore()
        assert restored is not None
        assert manager.observe({}, step=30, epoch=2)
    assert (folder / "run/epoch=0-step=10.ckpt").exists()


def test_the_record_before_must_have_the_same_name(tmp_path: Path) -> None:
    """Else a pending record would let the payload of one checkpoint prove the record of another one."""
    train(tmp_path, 0.5, 0.4, policy=ALL)
    first, second = look_at(open_storage(tmp_path, "")).records
    entry = Entry(record=second, status="pending", previous=first, owner=DEAD)
    with pytest.raises(RecordError, match=f"'previous' is the record of '{first.name}'; expected that of"):
        Entry.from_dict(entry.to_dict(), "here")
    (tmp_path / RECORDS / f"{second.name}.json").write_bytes(entry.to_json())
    said = command("ls", tmp_path)
    assert (1, True) == (said.code, "'previous' is the record of" in said.err)
    assert [first] == list(look_at(open_storage(tmp_path, "")).records)


# Folders that this process may not read


@pytest.mark.parametrize("name", ["lost+found", "others/run", "epoch=0-step=40.ckpt"])
def test_a_folder_of_another_user_is_foreign(folder: Path, name: str) -> None:
    """At the root of a mount there is one; nothing in it counts, its name is taken, and all else works."""
    run = train(folder / "run", 0.5, 0.4, policy=ALL)
    (run / name).parent.mkdir(exist_ok=True)
    others_folder(run / name)
    for argv in (("ls", run), ("last", run), ("verify", run), ("copy", run, folder / "copy"), ("sweep", run)):
        said = command(*argv)
        assert (0, "") == (said.code, said.err), (argv, said)
    assert f"{run / 'epoch=1-step=20.ckpt'}\n" == command("last", run).out
    with CheckpointManager(run, ALIASED, state=dict) as manager:
        assert manager.restore() is not None
        assert manager.observe({"loss": 0.1}, step=40, epoch=0)
        assert manager.last is not None
        assert ("epoch=0-step=40-v1.ckpt" if name.endswith(".ckpt") else "epoch=0-step=40.ckpt") == manager.last.name
    assert (1 if name.endswith(".ckpt") else 0) == command("adopt", run).code
    assert name in load(open_storage(run, "")).foreign


def test_a_folder_of_another_user_is_foreign_behind_a_driver_that_walks(folder: Path) -> None:
    """As over SFTP: fsspec's own search would leave the folder out, and a listing of everything would fail."""
    run = train(folder / "run", 0.5, 0.4, policy=ALL)
    for name in ("lost+found", "others/run"):
        (run / name).parent.mkdir(exist_ok=True)
        others_folder(run / name)
    storage = FsspecStorage(f"file://{run}", new_owner())
    assert {"lost+found", "others/run"} == {name for name, stat in storage.list().items() if stat == UNREADABLE}
    assert 2 == len(look_at(storage).records)
    assert {"others/run": UNREADABLE} == storage.list("others/run")
    with CheckpointManager(storage, ALL, state=dict) as manager:
        assert manager.restore() is not None
        assert manager.observe({}, step=40, epoch=3)
    forbid(run / RECORDS)
    with pytest.raises(StorageError, match=r"cannot read .*Permission denied"):
        look_at(storage)


def test_a_folder_that_may_hide_records_is_still_an_error(folder: Path) -> None:
    """A run does not start over because its records cannot be read."""
    run = train(folder / "run", 0.5, policy=ALL)
    forbid(run / RECORDS)
    with pytest.raises(StorageError, match=r"cannot use .*Permission denied"):
        CheckpointManager(run, ALL, state=dict)
    said = command("ls", run)
    assert (2, True) == (said.code, "chown" in said.err), said


def test_the_private_records_of_another_user_above_a_folder_are_passed_over(folder: Path) -> None:
    """Who may not see whether they name a file goes on as if they did not."""
    own = folder / "run" / "own"
    own.mkdir(parents=True)
    (own.parent / ".checkpointer" / "records").mkdir(parents=True)
    torch.save({"step": 3, "w": torch.ones(2)}, own / "model.pt")
    forbid(own.parent / ".checkpointer")
    assert "no record, but files such as model.pt" in command("ls", own).err
    for arguments in (("show", own / "model.pt"), ("adopt", own), ("export", own, 3, own / "w.pt")):
        said = command(*arguments)
        assert said.code == 0, (arguments, said)
