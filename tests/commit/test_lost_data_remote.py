"""Ways in which a checkpoint on a remote storage once was lost, each found by trying to lose one."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import attrs
import pytest
from support.faulty import FaultyFileSystem, Hook
from support.plain_format import PlainFormat
from support.servers.chaosproxy import ChaosProxy, Cut
from support.servers.fixtures import Serve

from checkpointer import (
    CheckpointerWarning,
    CheckpointManager,
    EverySteps,
    KeepAll,
    KeepEvery,
    KeepLast,
    Mirror,
    Policy,
)
from checkpointer.commit.index import load, record_path
from checkpointer.commit.index import save as save_index
from checkpointer.commit.journal import Journal
from checkpointer.commit.transaction import Transaction
from checkpointer.errors import NameTakenError, StorageError
from checkpointer.ports import Stat, Storage, Upload, Writable
from checkpointer.records.record import Entry, Record
from checkpointer.storage import open_storage
from checkpointer.storage.memory import MemoryStorage
from checkpointer.storage.owner import new_owner
from checkpointer.storage.remote import FsspecStorage
from checkpointer.storage.retry import Retry
from checkpointer.storage.same_place import refuse_same

POLICY = Policy(EverySteps(1), [KeepLast(3)])
QUICK = {"retry": Retry(deadline_s=10, first_wait_s=0.001)}


@pytest.fixture(autouse=True)
def faulty() -> Iterator[type[FaultyFileSystem]]:
    """Give the filesystem that does what a test says, and make it well again."""
    yield FaultyFileSystem
    FaultyFileSystem.hooks.clear()
    FaultyFileSystem.refuses = False


def save_two(url: str, **kwargs: Any) -> None:
    with CheckpointManager(url, POLICY, state=lambda: {"w": 1}, format=PlainFormat(), **kwargs) as manager:
        manager.observe({}, step=1, epoch=0)
        manager.observe({}, step=2, epoch=0)


def restored_step(url: str, **kwargs: Any) -> int | None:
    restored = CheckpointManager(url, POLICY, format=PlainFormat(), **kwargs).restore()
    return None if restored is None else restored.step


def fail_once(method: str, part: str, error: Exception) -> Callable[[str, str], None]:
    """Return a hook that raises at the first request of this method whose path has this part."""
    left = [error]

    def hook(asked: str, path: str) -> None:
        if asked == method and part in path and left:
            raise left.pop()

    return hook


@pytest.mark.parametrize("part", ["", ".checkpointer/records"])
@pytest.mark.parametrize("error", [ConnectionResetError("cut"), OSError("Socket is closed"), EOFError()], ids=repr)
def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(
    faulty: type[FaultyFileSystem], tmp_path: Path, part: str, error: Exception
) -> None:
    """fsspec's find leaves it out, and training would start over silently."""
    url = f"faulty://{tmp_path}"
    save_two(url)
    faulty.hooks["before"] = fail_once("ls", part, error)
    assert 2 == restored_step(url, storage_options=QUICK)


def test_a_folder_that_may_not_be_listed_is_an_error(faulty: type[FaultyFileSystem], tmp_path: Path) -> None:
    """Not an empty directory; it names the URL."""
    url = f"faulty://{tmp_path}"
    save_two(url)

    def refuse(method: str, path: str) -> None:
        if method == "ls" and "records" in path:
            raise PermissionError(path)

    faulty.hooks["before"] = refuse
    with pytest.raises(StorageError, match="cannot use faulty://"):
        restored_step(url, storage_options=QUICK)


def test_a_file_that_goes_while_its_folder_is_listed_does_not_take_the_others_along(
    faulty: type[FaultyFileSystem], tmp_path: Path
) -> None:
    """SMB's driver lists names, then asks after each: one that is retired meanwhile is not found."""
    url = f"faulty://{tmp_path}"
    save_two(url)
    faulty.hooks["before"] = fail_once("ls", "records", FileNotFoundError("gone since"))
    assert 2 == restored_step(url, storage_options=QUICK)


class BetweenUploads(MemoryStorage):
    """Memory on which something happens, once, just before a file is published."""

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[str, Callable[[], object]] = {}

    def write(self, path: str, data: bytes) -> None:
        if path in self.before:
            self.before.pop(path)()
        super().write(path, data)

    def upload(self, path: str) -> Upload:
        upload = super().upload(path)
        if path in self.before:
            happens, publish = self.before.pop(path), upload.publish

            def publish_late(*, replace: bool) -> None:
                happens()
                publish(replace=replace)

            upload.publish = publish_late  # type: ignore[method-assign]
        return upload


def draft(run: str, **fields: Any) -> Record:
    plain = {"step": 1, "epoch": 0, "time": 0.0, "size": 0, "digest": "", "format": "plain", "serial": 1}
    return Record.from_dict(
        Record(name="x.ckpt", run=run, token=run, **plain).to_dict()  # type: ignore[arg-type]
        | {"digest": "xxh3-128:" + "0" * 32, **fields},
        "a draft",
    )


def test_a_slot_that_moves_does_not_take_a_name_that_another_host_is_about_to_write() -> None:
    """It moves to the next version."""
    storage = BetweenUploads()
    there = Transaction(Journal(storage, "there~1~1~b"))
    name = "epoch=0-step=1.ckpt"
    theirs: list[Record] = []

    def write_new(stream: Writable) -> None:
        stream.write(NEW)

    def save_theirs() -> None:
        theirs.append(there.commit(draft("there", name=name), write_new, replaces=None))

    policy = Policy(EverySteps(1), [KeepEvery(steps=1000)], last="copy")
    with CheckpointManager(storage, policy, state=lambda: {"w": 1}, format=PlainFormat()) as manager:
        manager.observe({}, step=1, epoch=0)
        storage.before[f".checkpointer/records/{name}.json"] = save_theirs
        manager.pin("last.ckpt")
        assert ["epoch=0-step=1-v1.ckpt"] == [record.name for record in manager.records]
    assert NEW == storage.open(name).read()
    assert theirs == [entry.record for entry in load(storage).entries.values() if entry.record.name == name]


class WholeSeconds(MemoryStorage):
    """Memory whose versions are times in whole seconds, as those of SFTP are."""

    now = 11.0

    def __init__(self) -> None:
        super().__init__()
        self._modified: dict[str, float] = {}

    def write(self, path: str, data: bytes) -> None:
        super().write(path, data)
        self._modified[path] = float(int(self.now))

    def list(self, prefix: str = "") -> dict[str, Stat]:
        found = super().list(prefix)
        return {p: Stat(s.size, str(self._modified[p]), modified_s=self._modified[p]) for p, s in found.items()}


def test_a_record_rewritten_in_the_second_in_which_it_was_listed_is_not_hidden_by_the_index() -> None:
    """Another writer listed it, this one rewrote it, then the other wrote the index: a later second than the record."""
    storage = WholeSeconds()
    record = draft("run", name="last.ckpt", step=11)
    storage.write(record_path(record.name), Entry(record=record).to_json())
    listed = load(storage)
    storage.now = 11.9
    storage.write(record_path(record.name), Entry(record=attrs.evolve(record, step=12)).to_json())
    storage.now = 12.0
    save_index(storage, listed)
    assert [12] == [entry.record.step for entry in load(storage).entries.values()]


def test_a_mirror_that_is_the_directory_itself_under_another_name_retires_nothing(tmp_path: Path) -> None:
    """The text is not enough: links, mounts, ports and passwords spell one place in many ways."""
    policy = Policy(EverySteps(1), [KeepAll()])
    tiers: dict[str, Any] = {"mirror": Mirror(f"faulty://{tmp_path}", keep=[KeepLast(1)], options=QUICK)}
    manager = CheckpointManager(tmp_path, policy, state=lambda: {"w": 1}, format=PlainFormat(), **tiers)
    for step in (1, 2, 3):
        manager.observe({}, step=step, epoch=0)
    with pytest.warns(CheckpointerWarning, match="is the directory itself"):
        manager.close(timeout=60)
    assert [1, 2, 3] == [record.step for record in CheckpointManager(tmp_path, policy).records]


def test_a_mirror_of_the_same_url_is_refused_whatever_the_password() -> None:
    """And the password is not shown."""
    source = FsspecStorage("memory://me:secret@host/runs")
    with pytest.raises(StorageError, match="is the directory itself") as caught:
        refuse_same(source, "memory://me:secret@host/runs")
    assert "secret" not in str(caught.value)


def test_a_wrong_clock_here_does_not_sweep_what_a_live_writer_elsewhere_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the server's own clock says how old a file on it is."""
    storage = faulty_storage(tmp_path, "elsewhere~1~1~a")
    upload = storage.upload("a")
    upload.write(NEW * (1 << 20))
    upload.finish()
    started = time.time()
    monkeypatch.setattr(time, "time", lambda: started + 10 * 24 * 3600)
    assert 0 == faulty_storage(tmp_path).sweep()
    upload.publish(replace=False)


@pytest.mark.slow
@pytest.mark.parametrize("server", ["sftp", "ssh"])
def test_deleting_a_link_to_a_folder_leaves_what_is_in_the_folder(serve: Serve, server: str) -> None:
    """A user has moved a checkpoint to a larger disk."""
    running = serve(server)
    url = running.fresh()
    here = Path(url[url.index("/", len(f"{server}://")) :])
    (here / "far").mkdir(parents=True)
    (here / "far" / "precious").write_bytes(NEW)
    (here / "link").symlink_to(here / "far")
    storage = open_storage(url, new_owner(), running.storage_options)
    assert {"link"} == set(storage.list("link"))
    storage.delete("link")
    assert NEW == (here / "far" / "precious").read_bytes()


@pytest.mark.parametrize("when", ["x.ckpt", ".checkpointer/records/x.ckpt.json"])
def test_of_two_hosts_that_race_for_one_name_one_wins_and_keeps_its_checkpoint(when: str) -> None:
    """Neither knows whether the other is alive, so neither removes a record that the other announced or committed."""
    storage = BetweenUploads()
    here, there = Transaction(Journal(storage, "here~1~1~a")), Transaction(Journal(storage, "there~1~1~b"))
    outcomes: dict[str, object] = {}

    def save(writer: Transaction, run: str) -> None:
        try:
            outcomes[run] = writer.commit(draft(run), lambda stream: stream.write(run.encode()), replaces=None)  # type: ignore[arg-type]
        except NameTakenError:
            outcomes[run] = None

    storage.before[when] = lambda: save(there, "there")
    save(here, "here")

    [winner] = [record for record in outcomes.values() if record is not None]
    assert [winner] == [entry.record for entry in load(storage).entries.values() if entry.status == "committed"]
    assert isinstance(winner, Record)
    assert winner.run.encode() == storage.open("x.ckpt").read()


@pytest.mark.slow
@pytest.mark.parametrize("server", ["sftp", "ssh"])
@pytest.mark.parametrize("down", range(100, 9000, 600))
def test_a_connection_that_is_cut_anywhere_does_not_hide_a_checkpoint(serve: Serve, server: str, down: int) -> None:
    """Once cut, then well again: the newest is restored."""
    running = serve(server)
    url = running.fresh()
    save_two(url, storage_options=running.storage_options)
    with ChaosProxy(running.port) as proxy:
        proxy.plan = Cut(down=down)
        url = url.replace(f":{running.port}", f":{proxy.port}")
        options = attrs.evolve(running, port=proxy.port).storage_options
        assert 2 == restored_step(url, storage_options={**options, "retry": Retry(deadline_s=20)})


@pytest.mark.slow
@pytest.mark.parametrize("server", ["sftp", "ssh"])
def test_a_connection_that_is_cut_again_and_again_is_an_error(serve: Serve, server: str) -> None:
    """Not an empty directory."""
    running = serve(server)
    url = running.fresh()
    save_two(url, storage_options=running.storage_options)
    with ChaosProxy(running.port) as proxy:
        options = attrs.evolve(running, port=proxy.port).storage_options
        url = url.replace(f":{running.port}", f":{proxy.port}")
        storage = open_storage(url, "me", {**options, "retry": Retry(deadline_s=2)})
        proxy.plan = Cut(down=1, times=1000)
        with pytest.raises(OSError, match=r"reset|closed|EOF|Connection|connect"):
            storage.list()


OLD, NEW = b"old", b"new"
LOST = ConnectionResetError("the reply was lost")


def fail_at(method: str, part: str, nth: int, error: BaseException, *, ever_after: bool = False) -> Hook:
    """Return a hook that raises at the nth request of this method whose path has this part."""
    count = itertools.count(1)

    def hook(asked: str, path: str) -> None:
        if method in ("", asked) and part in path:
            number = next(count)
            if number == nth or (ever_after and number > nth):
                raise error

    return hook


def publish(storage: Storage, path: str, data: bytes, *, replace: bool) -> None:
    upload = storage.upload(path)
    try:
        upload.write(data)
        upload.finish()
        upload.publish(replace=replace)
    finally:
        upload.abort()


def faulty_storage(folder: Path, owner: str | None = None) -> Any:
    return open_storage(f"faulty://{folder}", owner or new_owner(), QUICK)


@pytest.mark.parametrize("refuses", [False, True])
@pytest.mark.parametrize("method", ["mv", "open wb"])
def test_a_lost_reply_does_not_fool_the_probe(
    faulty: type[FaultyFileSystem], tmp_path: Path, method: str, *, refuses: bool
) -> None:
    """Taken for a refusal, it would make the server's renames replace what others have written."""
    faulty.refuses = refuses
    well = faulty_storage(tmp_path).capabilities()
    faulty.hooks["after"] = fail_at(method, "probe", 1, LOST)
    assert well == faulty_storage(tmp_path).capabilities()


def test_a_claim_of_ours_whose_reply_was_lost_does_not_stop_us(faulty: type[FaultyFileSystem], tmp_path: Path) -> None:
    """It does not belong to another manager."""
    storage = faulty_storage(tmp_path)
    storage.prepare()
    faulty.hooks["after"] = fail_at("open wb", "claim-", 1, LOST)
    publish(storage, "a", NEW, replace=False)
    assert NEW == storage.open("a").read()


def test_a_claim_that_could_not_be_removed_does_not_stop_the_next_save(
    faulty: type[FaultyFileSystem], tmp_path: Path
) -> None:
    """Its writer is alive, but has released it."""
    storage = faulty_storage(tmp_path)
    storage.prepare()
    faulty.hooks["before"] = fail_at("rm", "claim-", 1, PermissionError("no"))
    publish(storage, "a", OLD, replace=False)
    storage.delete("a")
    publish(storage, "a", NEW, replace=False)
    assert NEW == storage.open("a").read()


def test_a_claim_of_a_machine_that_was_taken_away_does_not_block_the_next_one(tmp_path: Path) -> None:
    """Its host cannot be asked, and no record takes an hour to write."""
    gone, storage = faulty_storage(tmp_path, "gone~1~1~a"), faulty_storage(tmp_path)
    with gone._publisher._claim("a"):
        [claim] = tmp_path.rglob("claim-*")
        with pytest.raises(NameTakenError):
            publish(storage, "a", NEW, replace=False)
        os.utime(claim, (claim.stat().st_mtime - 3600,) * 2)
        publish(storage, "a", NEW, replace=False)
    assert NEW == storage.open("a").read()


@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2 << 20], ids=["small", "large"])
@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("refuses", [False, True])
def test_a_rename_whose_reply_is_lost_is_done_once(
    faulty: type[FaultyFileSystem], tmp_path: Path, nth: int, size: int, *, replace: bool, refuses: bool
) -> None:
    """At whichever of the renames it happens, the new file is there, and nothing else under its name."""
    faulty.refuses = refuses
    storage = faulty_storage(tmp_path)
    storage.prepare()
    if replace:
        storage.write("a", OLD)
    faulty.hooks["after"] = fail_at("mv", "", nth, LOST)
    publish(storage, "a", NEW * size, replace=replace)
    assert NEW * size == storage.open("a").read()
    storage.delete("a")
    assert {} == storage.list()


class Died(BaseException):
    """A kill: nothing of what comes after is carried out."""


@pytest.mark.parametrize("nth", range(1, 26, 3))
@pytest.mark.parametrize(("renames", "truth"), [(1, OLD), (2, NEW)])
@pytest.mark.parametrize("deletes", [False, True])
def test_dead_anywhere_in_a_replacement_or_deletion_there_is_one_truth(
    faulty: type[FaultyFileSystem], tmp_path: Path, nth: int, renames: int, truth: bytes, *, deletes: bool
) -> None:
    """If a server cannot replace, a reader sees old or new bytes, and a deleted file does not come back."""
    faulty.refuses = True
    storage = faulty_storage(tmp_path)
    storage.prepare()
    storage.write("a", OLD)
    faulty.hooks["before"] = fail_at("mv", "", renames + 1, Died(), ever_after=True)
    with pytest.raises(Died):
        storage.write("a", NEW)
    faulty.hooks.clear()
    storage = faulty_storage(tmp_path)
    storage.prepare()
    assert ({"a"}, truth) == (set(storage.list("a")), storage.open("a").read())

    faulty.hooks["before"] = fail_at("", "", nth, Died(), ever_after=True)
    with contextlib.suppress(Died):
        if deletes:
            storage.delete("a")
        else:
            storage.write("a", b"newest")
    faulty.hooks.clear()
    storage = faulty_storage(tmp_path)
    found = [storage.open(name).read() for name in storage.list()]
    assert found in ([[], [truth]] if deletes else [[truth], [b"newest"]])
    storage.delete("a")
    assert {} == storage.list()


def test_a_file_that_gets_its_name_while_it_is_looked_for_is_found(
    faulty: type[FaultyFileSystem], tmp_path: Path
) -> None:
    """A reader looks under the name while nothing has it, and where the new one waits when that is done."""
    faulty.refuses = True
    writer, reader = faulty_storage(tmp_path), faulty_storage(tmp_path)
    writer.prepare()
    (tmp_path / ".checkpointer" / "replacing").mkdir(parents=True)
    (tmp_path / ".checkpointer" / "replacing" / "a").write_bytes(NEW)

    def finish(method: str, path: str) -> None:
        if method == "open rb" and "replacing" in path:
            faulty.hooks.clear()
            os.rename(path, tmp_path / "a")

    faulty.hooks["before"] = finish
    assert NEW == reader.open("a").read()


def test_a_folder_that_another_writer_has_removed_is_made_anew(faulty: type[FaultyFileSystem], tmp_path: Path) -> None:
    """It was empty for a moment; it must not fail every later save."""
    one, other = faulty_storage(tmp_path), faulty_storage(tmp_path)
    one.prepare()
    one.write("sub/a", OLD)
    other.delete("sub/a")
    one.write("sub/b", NEW)
    assert NEW == one.open("sub/b").read()


def test_what_others_have_swept_is_not_taken_for_published(faulty: type[FaultyFileSystem], tmp_path: Path) -> None:
    """A staged file that is gone does not mean a lost reply: the old file has the name."""
    storage = faulty_storage(tmp_path)
    storage.prepare()
    storage.write("a", OLD)
    upload = storage.upload("a")
    upload.write(NEW * (1 << 20))
    upload.finish()
    for staged in (tmp_path / ".checkpointer" / "staging").glob("*/*"):
        staged.unlink()
    with pytest.raises(FileNotFoundError):
        upload.publish(replace=True)
    assert OLD == storage.open("a").read()


class Replaced(MemoryStorage):
    """Its records are replaced under the first readings of each."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.left = times

    def open(self, path: str) -> BinaryIO:
        if path.startswith(".checkpointer/records/") and self.left:
            self.left -= 1
            raise OSError(errno.ESTALE, "the file was replaced while it was read", path)
        return super().open(path)


@pytest.mark.parametrize("times", [0, 3])
def test_a_record_that_is_replaced_while_it_is_read_is_read_anew(times: int) -> None:
    """Another manager attaches metrics, just then."""
    storage = Replaced(0)
    with CheckpointManager(storage, POLICY, state=dict) as manager:
        manager.observe({"loss": 0.5}, 1, 0)
    storage.left = times
    storage.delete(".checkpointer/index.json")
    assert [1] == [record.step for record in CheckpointManager(storage).records]


def test_a_record_that_never_stands_still_is_an_error() -> None:
    """No manager rewrites one so often."""
    storage = Replaced(0)
    with CheckpointManager(storage, POLICY, state=dict) as manager:
        manager.observe({"loss": 0.5}, 1, 0)
    storage.left = 1000
    storage.delete(".checkpointer/index.json")
    with pytest.raises(OSError, match="replaced while it was read"):
        CheckpointManager(storage)
