"""Checkpoints that give up their name, folders that go in one step, and claims of the dead."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy
from checkpointer.errors import SaveError, StorageError
from checkpointer.policy.naming import Naming
from checkpointer.storage.local import LocalStorage
from checkpointer.storage.owner import new_owner, release

POLICY = Policy(EverySteps(1), [KeepLast(3)], name=Naming("step-{step}", auto_insert=False, extension=""), last="link")


def write_folder(path: str) -> None:
    """Write a checkpoint as a trainer does."""
    os.makedirs(path)
    for name in ("a", "b"):
        Path(path, name).write_text(name)


def make(directory: Path) -> CheckpointManager:
    """Return a manager of folders."""
    return CheckpointManager(directory, POLICY, save=write_folder)


def names(directory: Path) -> list[str]:
    """Return what lies in the directory."""
    return sorted(path.name for path in directory.iterdir() if path.name != ".checkpointer")


def test_a_checkpoint_moves_with_its_record_and_a_file_of_others_without(tmp_path: Path) -> None:
    """Under a name with a version if the first is taken; nothing moves if nothing is there."""
    with make(tmp_path) as manager:
        for step in (1, 2):
            manager.observe({}, step=step, epoch=0, epoch_end=False)
        shutil.copytree(tmp_path / "step-1", tmp_path / "step-9")
        assert "earlier-step-2" == manager.session.make_way("step-2")
        assert "earlier-step-9" == manager.session.make_way("step-9")
        assert manager.session.make_way("step-7") is None
        (tmp_path / "kept-step-1").touch()
        assert "kept-step-1-v1" == manager.session.make_way("step-1", "kept-step-1")
        assert ["kept-step-1-v1", "earlier-step-2"] == [record.name for record in manager.records]
        manager.observe({}, step=3, epoch=0, epoch_end=False)
    assert ["kept-step-1-v1", "earlier-step-2", "step-3"] == [record.name for record in make(tmp_path).records]
    assert ["earlier-step-2", "earlier-step-9", "kept-step-1", "kept-step-1-v1", "last", "step-3"] == names(tmp_path)


def test_without_paths_nothing_can_make_way() -> None:
    """In memory, say."""
    manager = CheckpointManager(None, POLICY, state=dict)
    manager.observe({}, step=1, epoch=0, epoch_end=False)
    with pytest.raises(StorageError, match="has no paths"):
        manager.session.make_way("step-1")


MOVE = """
import os, sys
from pathlib import Path
from test_making_way import make
calls = {"rename": os.rename, "replace": os.replace, "unlink": os.unlink, "link": os.link}
left = int(sys.argv[2])
def dying(name):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return calls[name](*args, **kwargs)
    return call
with make(Path(sys.argv[1])) as manager:
    for name in calls:
        setattr(os, name, dying(name))
    manager.session.make_way("step-2")
    left = 10**9
"""


@pytest.mark.slow
def test_dead_at_any_point_of_a_move_the_checkpoint_has_one_name(tmp_path: Path) -> None:
    """Old or new, never neither, and never two records of one checkpoint."""
    died = 0
    for count in range(30):
        directory = tmp_path / str(count)
        with make(directory) as manager:
            for step in (1, 2):
                manager.observe({}, step=step, epoch=0, epoch_end=False)
        environment = {**os.environ, "PYTHONPATH": ":".join(path for path in sys.path if path)}
        done = subprocess.run([sys.executable, "-c", MOVE, directory, str(count)], env=environment)
        assert done.returncode in (0, 9)
        with make(directory) as manager:
            found = {record.step: record.name for record in manager.session.manifest.records}
            assert {1, 2} == found.keys()
            assert 2 == len(manager.session.manifest.records)
            assert (directory / found[2] / "a").is_file()
        if done.returncode == 0:
            assert "earlier-step-2" == found[2]
            break
        died += 1
    assert died >= 4


def test_a_folder_is_deleted_in_one_step(tmp_path: Path) -> None:
    """One whose inside cannot be deleted is gone from its place all the same, and never half there."""
    storage = LocalStorage(tmp_path, new_owner())
    write_folder(str(tmp_path / "a"))
    watched: list[bool] = []

    class Watching(LocalStorage):
        def _new_staged(self) -> Path:
            watched.append((tmp_path / "a/b").exists())
            return super()._new_staged()

    Watching(tmp_path, new_owner()).delete("a")
    assert [True] == watched
    assert not (tmp_path / "a").exists()
    storage.close()


def test_a_claim_of_a_dead_writer_is_swept_and_of_a_live_one_holds(tmp_path: Path) -> None:
    """A kill between the claim on a folder's name and the rename left the name claimed for a day."""
    owners = [new_owner(), new_owner()]
    storages = [LocalStorage(tmp_path, owner) for owner in owners]
    path, upload = storages[0].stage("a")
    write_folder(path)
    with upload._claim():  # type: ignore[attr-defined]
        claims = list(tmp_path.rglob("claim-*"))
        assert 1 == len(claims)
        other, late = storages[1].stage("a")
        write_folder(other)
        assert 0 == storages[1].sweep()
        with pytest.raises(OSError, match="appeared while it was about to be written"):
            late.publish(replace=False)
        shutil.copytree(claims[0], tmp_path / "copy")
    assert [] == list(tmp_path.rglob("claim-*"))
    shutil.move(tmp_path / "copy", claims[0])
    release(owners[0])
    assert 1 <= storages[1].sweep()
    late.publish(replace=False)
    assert ["a", "b"] == names(tmp_path / "a")


def test_what_a_state_says_of_the_save_it_goes_into(tmp_path: Path) -> None:
    """A host that writes its own account before the commit."""
    with make(tmp_path) as manager:
        decision = manager.session.decide({}, 5, 0, epoch_end=False)
        assert decision
        state = manager.session.state_dict(decision)
        assert (5, 5) == (state["step"], state["since"]["step"])
        assert 0 == manager.session.state_dict()["since"]["step"]
    with pytest.raises(SaveError, match="nothing to save"):
        CheckpointManager(tmp_path / "b", POLICY).session.commit(decision)
