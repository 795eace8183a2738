"""No command changes a directory under a live writer, or one that is signed without its key."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.commands import command, snapshot, train

from checkpointer import CheckpointManager, EverySteps, HMACKey, KeepAll, KeepLast, Policy
from checkpointer.commit.writer_marks import WRITERS, refuse_if_live, writers_in
from checkpointer.errors import AliasInUseError, UntrustedError
from checkpointer.records.record import Entry
from checkpointer.storage import open_storage
from checkpointer.storage.owner import is_earlier_boot, machine, new_owner, release
from checkpointer.tools.catalog import look_at
from checkpointer.tools.sweep import sweep

ALL = Policy(EverySteps(1), [KeepAll()])
KEY = "0f3c5a" * 8
FIRST = "epoch=0-step=10.ckpt"


@pytest.fixture
def last(tmp_path: Path) -> Path:
    """A policy file that keeps one."""
    path = tmp_path / "policy.yaml"
    Policy(EverySteps(1), [KeepLast(1)]).to_yaml(path)
    return path


def plant_mark(folder: Path, owner: str, of_machine: str = "") -> None:
    """Leave the mark that a writer elsewhere left."""
    path = folder / WRITERS / f"{owner}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schema": 1, "owner": owner, "machine": of_machine}))


@pytest.mark.parametrize("kind", ["path", "url"])
def test_a_live_manager_without_an_alias_keeps_prune_and_copy_out(tmp_path: Path, last: Path, kind: str) -> None:
    """Its mark is there from its start to its end, saved or not; a reader leaves none."""
    place = str(tmp_path / "run") if kind == "path" else f"memory://writers/{tmp_path.name}"
    source = train(tmp_path / "other", 0.5, policy=ALL)
    with CheckpointManager(place, ALL, state=dict) as manager:
        manager.observe({}, step=1, epoch=0)
        manager.observe({}, step=2, epoch=1)
    assert [] == writers_in(open_storage(place, ""))
    with CheckpointManager(place, ALL, state=dict):
        for argv in (("prune", place, "-p", last, "--apply"), ("copy", source, place)):
            said = command(*argv)
            assert (2, True) == (said.code, "is writing to" in said.err), said.err
        assert 0 == command("prune", place, "-p", last).code  # A dry run changes nothing.
        assert "writing   process " in command("sweep", place).out
    with CheckpointManager(place, ALL):
        assert [] == writers_in(open_storage(place, ""))
        assert 0 == command("prune", place, "-p", last, "--apply").code


_KILLED = """
import os, signal, sys
from checkpointer import CheckpointManager, EverySteps, KeepAll, Policy
manager = CheckpointManager(sys.argv[1], Policy(EverySteps(1), [KeepAll()]), state=dict)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_mark_of_a_killed_process_blocks_nothing_and_is_cleared(tmp_path: Path, last: Path) -> None:
    """The next manager removes it, or sweep does."""
    run = train(tmp_path / "run", 0.5, 0.4, policy=ALL)
    for clear in (lambda: command("sweep", run), lambda: CheckpointManager(run, ALL, state=dict).close()):
        subprocess.run([sys.executable, "-W", "ignore", "-c", _KILLED, str(run)], timeout=120)
        assert 1 == len(writers_in(open_storage(run, "")))
        refuse_if_live(open_storage(run, ""), "run")
        clear()
        assert [] == writers_in(open_storage(run, ""))
    assert 0 == command("prune", run, "-p", last, "--apply").code


def test_a_manager_that_was_not_closed_blocks_nothing(tmp_path: Path) -> None:
    """It is gone, though its process is alive."""
    manager = CheckpointManager(tmp_path, ALL, state=dict)
    with pytest.raises(AliasInUseError, match="is writing to here; nothing was changed"):
        refuse_if_live(open_storage(tmp_path, ""), "here")
    del manager
    gc.collect()
    refuse_if_live(open_storage(tmp_path, ""), "here")


def test_a_writer_on_another_machine_counts_until_a_user_says_that_it_has_ended(tmp_path: Path, last: Path) -> None:
    """This machine does not know."""
    run = train(tmp_path / "run", 0.5, 0.4, policy=ALL)
    plant_mark(run, "node7_1234abcd_99~17~5~0123456789ab")
    before = snapshot(run)
    said = command("prune", run, "-p", last, "--apply")
    assert (2, before) == (said.code, snapshot(run))
    assert "process 17 on another machine (node7) may be writing to" in said.err
    assert f"run 'checkpointer sweep {run} --force' first" in said.err
    assert "writing   process 17 on another machine (node7)" in command("sweep", run).out
    assert 0 == command("sweep", run, "--force").code
    assert 0 == command("prune", run, "-p", last, "--apply").code


def test_force_finishes_what_a_writer_on_another_machine_left(tmp_path: Path) -> None:
    """A removal that it had begun; but never what a live writer here does."""
    run = train(tmp_path / "run", 0.5, 0.4, policy=ALL)
    (first, second) = look_at(open_storage(run, "")).records
    alive = new_owner()
    for record, owner in ((first, "node7_1234abcd_99~17~5~0123456789ab"), (second, alive)):
        entry = Entry(record=record, status="retired", owner=owner)
        (run / f".checkpointer/records/{record.name}.json").write_bytes(entry.to_json())
    assert [first.name, second.name] == list(sweep(open_storage(run, "me"), "me").left)
    swept = sweep(open_storage(run, "me"), "me", force=True)
    assert ((first.name,), (second.name,)) == (swept.finished, swept.left)
    release(alive)


def test_a_mark_from_before_the_last_boot_blocks_nothing(tmp_path: Path) -> None:
    """The machine is the same, so the process is gone."""
    own = new_owner().split("~")[0]
    name, boot, space = own.rsplit("_", 2) if own.count("_") >= 2 else ("a", "b", "c")
    assert is_earlier_boot(f"{name}_{boot[::-1]}x_{space}~1~2~ab", f"{name}_{boot}_{space}")
    assert not is_earlier_boot(f"{name}_{boot}_{space}~1~2~ab", f"{name}_{boot}_{space}")
    assert not is_earlier_boot(f"other_{boot}x_{space}~1~2~ab", f"{name}_{boot}_{space}")
    if not machine():
        pytest.skip("this machine has no id")
    for of_machine in ("", "another", machine()):
        plant_mark(tmp_path, f"{name}_{boot}x_{space}~1~2~ab", of_machine)
        if of_machine == machine():
            refuse_if_live(open_storage(tmp_path, ""), "here")
        else:
            with pytest.raises(AliasInUseError, match="may be writing to here"):
                refuse_if_live(open_storage(tmp_path, ""), "here")


def test_a_mark_that_is_removed_under_a_manager_is_written_again(tmp_path: Path, last: Path) -> None:
    """After its next save a live manager without an alias keeps prune out again."""
    with CheckpointManager(tmp_path / "run", ALL, state=dict) as manager:
        manager.observe({}, step=1, epoch=0)
        shutil.rmtree(tmp_path / "run" / WRITERS)
        manager.observe({}, step=2, epoch=1)
        said = command("prune", tmp_path / "run", "-p", last, "--apply")
        assert (2, True) == (said.code, "is writing to" in said.err), said.err
    assert [] == writers_in(open_storage(tmp_path / "run", ""))


def test_a_directory_that_is_removed_under_a_manager_breaks_nothing(tmp_path: Path) -> None:
    """The mark goes with it."""
    with CheckpointManager(tmp_path / "run", ALL, state=dict) as manager:
        shutil.rmtree(tmp_path / "run")
        manager.observe({}, step=1, epoch=0)
    assert [] == writers_in(open_storage(tmp_path / "run", ""))


# A signed directory


@pytest.fixture
def signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two signed checkpoints, whose key is in the environment."""
    monkeypatch.setenv("CKPT_KEY", KEY)
    return train(tmp_path / "signed", 0.5, 0.4, policy=ALL, trust=HMACKey.from_env("CKPT_KEY"))


def test_no_command_changes_a_signed_directory_without_its_key(signed: Path, last: Path, tmp_path: Path) -> None:
    """No command removes or adds; with the key each one does."""
    other = train(tmp_path / "other", 0.5, policy=Policy(EverySteps(1), [KeepAll()], name="other-{step}"))
    torch.save({"w": torch.ones(1)}, signed / "step_7.pt")
    before = snapshot(signed)
    changes = (
        ("sweep", signed),
        ("copy", other, signed),
        ("adopt", signed),
        ("export", signed, FIRST, signed / "w.safetensors"),
        ("export", other, 10, signed / "w2.safetensors"),
        ("average", signed, FIRST, "epoch=1-step=20.ckpt", "--out", signed / "mean.safetensors"),
        ("report", signed, signed / "report.html"),
        ("prune", signed, "-p", last, "--apply"),
    )
    for argv in changes:
        said = command(*argv)
        assert (2, True) == (said.code, "are signed; pass their key" in said.err), (argv, said)
        assert before == snapshot(signed), argv
    with CheckpointManager(signed, ALL) as reader, pytest.raises(UntrustedError, match="pass trust="):
        reader.to_yaml()
    assert before == snapshot(signed)
    for argv in changes:
        if argv[1] == signed:  # What the key has not signed is damaged.
            assert 0 == command(*argv, "--key-env", "CKPT_KEY").code, argv


def test_a_planted_record_lets_no_signed_checkpoint_go(signed: Path, last: Path, tmp_path: Path) -> None:
    """Neither with the key nor without it is anything removed until the plant is."""
    plant = train(tmp_path / "plant", 0.9, policy=Policy(EverySteps(1), [KeepAll()], name="plant-{step}"))
    for path in ("plant-step=10.ckpt", ".checkpointer/records/plant-step=10.ckpt.json"):
        shutil.copy(plant / path, signed / path)
    data = json.loads((signed / ".checkpointer/records/plant-step=10.ckpt.json").read_bytes())
    data["record"]["step"] = 1000
    (signed / ".checkpointer/records/plant-step=10.ckpt.json").write_text(json.dumps(data))
    before = snapshot(signed)
    said = command("prune", signed, "-p", last)
    assert (1, True) == (said.code, "2 of 3 records are signed, and no signature was checked" in said.err)
    assert "plant-step=10.ckpt" not in said.out
    for key in ((), ("--key-env", "CKPT_KEY")):
        assert 2 == command("prune", signed, "-p", last, "--apply", *key).code
        assert before == snapshot(signed)
