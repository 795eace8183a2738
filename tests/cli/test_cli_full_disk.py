"""Commands on a disk that is full: what a person has there stays, and the error says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import mounts
from support.commands import command

from checkpointer import CheckpointManager, EverySteps, KeepAll, KeepBest, Policy
from checkpointer.storage import open_storage

KB = 1000


def train(folder: Path, count: int = 3, floats: int = 20_000) -> Path:
    """Save so many checkpoints of 80 kB."""
    policy = Policy(EverySteps(1), [KeepAll(), KeepBest(1, "loss", mode="min")], last="link")
    with CheckpointManager(folder, policy, state=lambda: {"w": torch.ones(floats)}) as manager:
        for step in range(1, count + 1):
            manager.observe({"loss": 1 / step}, step=step, epoch=0)
    return folder


def test_a_file_that_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    """No empty picture, page, policy or weights, and no temporary name in the error."""
    run = train(tmp_path / "run")
    with mounts.tmpfs(tmp_path, 2 * mounts.MIB) as disk:
        (disk / "old.html").write_text("the page of yesterday")
        with mounts.filled(disk, 0):
            for argv in (
                ["export", run, 3, disk / "w.pt"],
                ["average", run, "--best", 2, "-o", disk / "w.safetensors"],
                ["plot", run, disk / "p.png"],
                ["report", run, disk / "old.html"],
                ["policy", "init", disk / "p.yaml"],
            ):
                said = command(*argv)
                out = next(part for part in argv if str(part).startswith(str(disk)))
                assert (2, f"checkpointer: cannot write {out}: No space left on device\n") == (said.code, said.err)
            assert {"ballast", "old.html"} == {path.name for path in disk.iterdir()}
            assert "the page of yesterday" == (disk / "old.html").read_text()


def test_a_copy_into_a_new_folder_looks_at_the_space_first(tmp_path: Path) -> None:
    """The folder is not there yet, but its disk is."""
    run = train(tmp_path / "run")
    with mounts.tmpfs(tmp_path, mounts.MIB) as disk, mounts.filled(disk, 200 * KB):
        said = command("copy", run, disk / "deep" / "copy")
        assert (2, True) == (said.code, "3 checkpoints need" in said.err and "nothing was copied" in said.err)
        assert not (disk / "deep").exists()


def test_the_free_space_of_a_folder_that_is_not_there_is_that_of_its_disk(tmp_path: Path) -> None:
    """Else nothing is known before the first write."""
    free = [open_storage(folder, "").free_space() for folder in (tmp_path, tmp_path / "a" / "b")]  # type: ignore[attr-defined]
    assert 0 < free[0]
    assert pytest.approx(free[0], rel=0.01) == free[1]


def test_on_a_full_disk_a_removal_says_how_to_begin(tmp_path: Path) -> None:
    """It cannot note what it removes. After one file was deleted by hand it goes on."""
    with mounts.tmpfs(tmp_path, mounts.MIB) as disk:
        run = train(disk / "run")
        with mounts.filled(disk, 0):
            said = command("rm", run, 1, 2, "--apply")
            first = run / "epoch=0-step=1.ckpt"
            assert (2, True) == (said.code, f"delete one file yourself, such as {first}" in said.err)
            first.unlink()
            assert 0 == command("rm", run, 2, "--apply").code
            assert {"epoch=0-step=3.ckpt", "last.ckpt"} == {path.name for path in run.iterdir() if path.is_file()}
