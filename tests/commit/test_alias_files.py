"""Files that users put where an alias was: they are not replaced; links and copies that this library made are."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from support.plain_format import PlainFormat

from checkpointer import CheckpointerWarning, CheckpointManager, EverySteps, KeepBest, KeepLast, Policy
from checkpointer.commit.aliases import duplicate
from checkpointer.errors import SaveError
from checkpointer.storage import LocalStorage
from checkpointer.testing import MemoryStorage

How = Literal["link", "copy"]
HOWS = pytest.mark.parametrize("how", ["link", "copy"])


def policy(how: How) -> Policy:
    """Return a policy with both aliases."""
    return Policy(EverySteps(1), [KeepBest(1, "loss", mode="min"), KeepLast(1)], last=how, best=how)


def slots() -> Policy:
    """Return a policy whose newest checkpoints lie under the alias itself."""
    return Policy(EverySteps(1), [KeepBest(1, "loss", mode="min")], last="copy")


def opened(where: Any, policy: Policy) -> CheckpointManager:
    """Return a manager whose payloads all have the same size."""
    return CheckpointManager(where, policy, state=lambda: {"step": steps[0]}, format=PlainFormat())


steps = [0]


def save(manager: CheckpointManager, *losses: float, start: int = 1) -> None:
    """Report losses at steps from ``start`` on."""
    for step, loss in enumerate(losses, start=start):
        steps[0] = step
        manager.observe({"loss": loss}, step=step, epoch=0, epoch_end=False)


def put_file(folder: Path, name: str) -> None:
    """Put a file of the size of a checkpoint in the place of an alias."""
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(b'{"step": 9}')


def put_link(folder: Path, name: str) -> None:
    """Put a link to a file elsewhere there."""
    (folder / name).unlink(missing_ok=True)
    (folder.parent / "theirs").write_bytes(b'{"step": 9}')
    (folder / name).symlink_to(os.path.join("..", "theirs"))


def put_folder(folder: Path, name: str) -> None:
    """Put a folder there."""
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    (folder / name / "theirs").write_bytes(b'{"step": 9}')


PUTS = pytest.mark.parametrize("put", [put_file, put_link, put_folder])


def content(path: Path) -> bytes:
    """Return a snapshot of the planted file, link or folder."""
    return (path / "theirs" if path.is_dir() else path).read_bytes()


def replaced() -> Any:
    """A save in the block must warn that the alias has another name."""
    return pytest.warns(CheckpointerWarning, match=r"last\.ckpt is not this run's; the alias is last-v1\.ckpt instead")


@HOWS
@PUTS
def test_a_file_that_was_put_under_an_alias_between_two_runs_stays(
    tmp_path: Path, how: How, put: Callable[[Path, str], None]
) -> None:
    """The next process takes another name for the alias, and says so."""
    folder = tmp_path / "run"
    with opened(folder, policy(how)) as manager:
        save(manager, 0.1, 0.2)
    put(folder, "last.ckpt")
    with replaced():
        manager = opened(folder, policy(how))
    with manager:
        manager.restore()
        save(manager, 0.3, start=3)
        assert "last-v1.ckpt" == manager.policy.name.last_file
    assert b'{"step": 9}' == content(folder / "last.ckpt")
    assert b'{"step": 3}' == (folder / "last-v1.ckpt").read_bytes()


@HOWS
@PUTS
def test_a_file_that_was_put_under_an_alias_while_the_run_goes_on_stays(
    tmp_path: Path, how: How, put: Callable[[Path, str], None]
) -> None:
    """The alias has another name from the next save on."""
    folder = tmp_path / "run"
    with opened(folder, policy(how)) as manager:
        save(manager, 0.1, 0.2)
        put(folder, "last.ckpt")
        with replaced():
            save(manager, 0.3, start=3)
        save(manager, 0.4, start=4)
    assert b'{"step": 9}' == content(folder / "last.ckpt")
    assert b'{"step": 4}' == (folder / "last-v1.ckpt").read_bytes()


@PUTS
def test_a_file_that_was_put_in_the_place_of_a_slot_stays(tmp_path: Path, put: Callable[[Path, str], None]) -> None:
    """The next checkpoint that only the alias wants is written under another."""
    folder = tmp_path / "run"
    with opened(folder, slots()) as manager:
        save(manager, 0.1, 0.2)
        put(folder, "last.ckpt")
        with replaced():
            save(manager, 0.3, start=3)
        save(manager, 0.4, start=4)
    assert b'{"step": 9}' == content(folder / "last.ckpt")
    assert b'{"step": 4}' == (folder / "last-v1.ckpt").read_bytes()


@pytest.mark.filterwarnings("ignore:.*(not count|restored epoch=0-step=1.ckpt):checkpointer.CheckpointerWarning")
def test_a_file_of_another_size_in_the_place_of_a_slot_stays(tmp_path: Path) -> None:
    """Between two runs its record shows that it is not the checkpoint."""
    with opened(tmp_path, slots()) as manager:
        save(manager, 0.1, 0.2)
    (tmp_path / "last.ckpt").write_bytes(b"theirs")
    with replaced(), opened(tmp_path, slots()) as manager:
        manager.restore()
        save(manager, 0.3, start=3)
    assert b"theirs" == (tmp_path / "last.ckpt").read_bytes()


def test_elsewhere_a_file_of_another_size_under_an_alias_stays() -> None:
    """A listing shows no more than the size."""

    class Far(MemoryStorage):
        symlink = hardlink = None  # type: ignore[assignment]

    storage = Far()
    with opened(storage, policy("copy")) as manager:
        save(manager, 0.1, 0.2)
    storage.write("last.ckpt", b"theirs")
    with replaced():
        manager = opened(storage, policy("copy"))
    with manager:
        manager.restore()
        save(manager, 0.3, start=3)
    assert b"theirs" == storage.open("last.ckpt").read()


@HOWS
def test_the_aliases_of_a_copied_directory_are_its_own(tmp_path: Path, how: How) -> None:
    """With links followed or not: a copy of a checkpoint under the alias counts as ours."""
    with opened(tmp_path / "run", policy(how)) as manager:
        save(manager, 0.1, 0.2)
    for symlinks in (True, False):
        copy = tmp_path / f"copy-{symlinks}"
        shutil.copytree(tmp_path / "run", copy, symlinks=symlinks)
        with opened(copy, policy(how)) as manager:
            manager.restore()
            save(manager, 0.05, start=3)
        assert ["best.ckpt", "epoch=0-step=3.ckpt", "last.ckpt"] == sorted(path.name for path in copy.glob("*.ckpt"))
        assert b'{"step": 3}' == (copy / "last.ckpt").read_bytes() == (copy / "best.ckpt").read_bytes()


@HOWS
@pytest.mark.parametrize("format", ["torch", "dcp"])
@pytest.mark.parametrize("alias", ["last", "best"])
def test_an_empty_folder_in_the_place_of_an_alias_is_named(tmp_path: Path, how: How, format: Any, alias: str) -> None:
    """No listing shows it. The message names it, and no temporary file; the checkpoint is saved."""
    state = {"w": torch.ones(2)}
    name = f"{alias}.{'dcp' if format == 'dcp' else 'ckpt'}"
    (tmp_path / name).mkdir()
    message = re.escape(f"the alias {name} could not be made ([Errno 21] a folder has this name; move it away: ")
    manager = CheckpointManager(tmp_path, policy(how), state=lambda: state, format=format)
    with pytest.warns(CheckpointerWarning, match=f"{message}'{re.escape(str(tmp_path / name))}'"):
        manager.observe({"loss": 1.0}, step=1, epoch=0)
    (tmp_path / name).rmdir()
    manager.observe({"loss": 0.5}, step=2, epoch=0)
    manager.close()
    assert manager.last is not None
    assert (tmp_path / name).samefile(tmp_path / manager.last.name)


@pytest.mark.parametrize("format", ["torch", "dcp"])
def test_an_empty_folder_in_the_place_of_a_checkpoint_is_named(tmp_path: Path, format: Any) -> None:
    """It was there before; without the folder the next save goes on."""
    state = {"w": torch.ones(2)}
    folder = tmp_path / f"step=1.{'dcp' if format == 'dcp' else 'ckpt'}"
    folder.mkdir()
    every = Policy(EverySteps(1), [KeepLast(1)], name="{step}")
    manager = CheckpointManager(tmp_path, every, state=lambda: state, format=format)
    with pytest.raises(SaveError, match=re.escape(f"an empty folder has the name {folder}; remove it")):
        manager.observe({}, step=1, epoch=0)
    folder.rmdir()
    manager.observe({}, step=2, epoch=0)
    manager.close()
    assert manager.last is not None
    assert 2 == manager.last.step


class WithoutLinks(LocalStorage):
    """A disk like exFAT, which has no links."""

    def symlink(self, target: str, path: str) -> None:
        raise PermissionError(1, "Operation not permitted", path)

    hardlink = symlink


def test_the_message_for_a_folder_on_a_disk_without_links_names_the_links(tmp_path: Path) -> None:
    """A folder cannot be copied as a file can, so its only alias is a link."""
    storage = WithoutLinks(tmp_path, "")
    (tmp_path / "a.dcp").mkdir()
    (tmp_path / "a.dcp" / "data").write_bytes(b"1")
    with pytest.raises(PermissionError, match=r"Operation not permitted: 'last\.dcp'"):
        duplicate(storage, "a.dcp", "last.dcp", "link")


class WithoutAnyLinks(LocalStorage):
    """A storage of a user, on a system whose Python knows no links."""

    def symlink(self, target: str, path: str) -> None:
        raise NotImplementedError("no links here")

    hardlink = symlink


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_an_alias_of_a_folder_that_no_link_can_have_does_not_end_the_save(tmp_path: Path) -> None:
    """Its checkpoint is committed by then, so there is a warning."""
    storage = WithoutAnyLinks(tmp_path, "owner")
    aliased = Policy(EverySteps(1), [KeepLast(1)], name="{step}", last="link")
    with CheckpointManager(storage, aliased, state=lambda: {"w": torch.ones(2)}, format="dcp") as manager:
        with pytest.warns(CheckpointerWarning, match=r"the alias last\.dcp could not be made .* itself is saved"):
            assert manager.observe({}, step=1, epoch=0)
        assert manager.last is not None
