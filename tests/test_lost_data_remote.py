"""Ways in which a checkpoint on a remote storage once was lost, each found by trying to lose one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from faulty import FaultyFileSystem
from plain_format import PlainFormat
from servers.chaosproxy import ChaosProxy, Cut
from servers.fixtures import Serve

from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy
from checkpointer.errors import NameTakenError
from checkpointer.index import load
from checkpointer.records import Record
from checkpointer.storage import open_storage
from checkpointer.storage.memory import MemoryStorage, MemoryUpload
from checkpointer.storage.retrying import Retry
from checkpointer.transaction import Transaction

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
    """Not an empty directory."""
    url = f"faulty://{tmp_path}"
    save_two(url)

    def refuse(method: str, path: str) -> None:
        if method == "ls" and "records" in path:
            raise PermissionError(path)

    faulty.hooks["before"] = refuse
    with pytest.raises(PermissionError):
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

    def upload(self, path: str) -> MemoryUpload:
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


@pytest.mark.parametrize("when", ["x.ckpt", ".checkpointer/records/x.ckpt.json"])
def test_of_two_hosts_that_race_for_one_name_one_wins_and_keeps_its_checkpoint(when: str) -> None:
    """Neither can tell whether the other lives: what the other has announced, or committed, is not cleared away."""
    storage = BetweenUploads()
    here, there = Transaction(storage, "here~1~1~a"), Transaction(storage, "there~1~1~b")
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
