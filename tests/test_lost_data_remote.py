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
from checkpointer.storage import open_storage
from checkpointer.storage.retrying import Retry

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
