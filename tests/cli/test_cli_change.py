"""The commands that make or remove something: prune, sweep, copy, adopt, export, average; and diff."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.commands import POLICY, command, snapshot, train

from checkpointer import CheckpointManager, EverySteps, HMACKey, KeepAll, KeepBest, KeepLast, Policy
from checkpointer.errors import NotEnoughSpaceError
from checkpointer.formats.export import write_weights
from checkpointer.formats.inspection.payload import open_contents
from checkpointer.formats.inspection.tensors import TensorInfo
from checkpointer.storage import LocalStorage, MemoryStorage, open_storage
from checkpointer.storage.owner import new_owner
from checkpointer.testing import Crash, CrashingStorage, die
from checkpointer.tools.catalog import look_at
from checkpointer.tools.copy import copy
from checkpointer.tools.verify import verify_all

ALL = Policy(EverySteps(1), [KeepAll()])
ALL_LINKED = Policy(EverySteps(1), [KeepAll(), KeepBest(1, "loss", mode="min")], last="link", best="copy")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that keeps everything; step 20 is the best."""
    return train(tmp_path / "run", 0.9, 0.2, 0.5, 0.7, policy=ALL)


def policy_file(tmp_path: Path, policy: Policy) -> Path:
    path = tmp_path / "policy.yaml"
    policy.to_yaml(path)
    return path


# diff


def test_diff_shows_norm_largest_element_and_direction(run: Path) -> None:
    """The weights of step 20 are those of step 10 times 0.2 / 0.9."""
    said = command("diff", run, 10, 20, "--json")
    assert 1 == said.code
    changed, same = said.data["tensors"]
    assert ("model.w", "changed", "model.b", "same") == (changed["name"], changed["kind"], same["name"], same["kind"])
    before, after = torch.arange(6.0).double() * 0.9, torch.arange(6.0).double() * 0.2
    assert (after - before).norm().item() == pytest.approx(changed["norm"], rel=1e-6)
    assert ((after - before).norm() / before.norm()).item() == pytest.approx(changed["relative"], rel=1e-6)
    assert 3.5 == pytest.approx(changed["max"])
    assert 1.0 == pytest.approx(changed["cosine"])
    assert "1 of 2 tensors and 0 values differ" in command("diff", run, 10, 20).out


def test_diff_of_the_same_exits_with_0(run: Path) -> None:
    """As diff does."""
    said = command("diff", run, 20, "epoch=1-step=20.ckpt")
    assert (0, "0 of 2 tensors and 0 values differ\n") == (said.code, said.out)


def test_diff_shows_what_was_added_removed_and_reshaped(tmp_path: Path) -> None:
    """Values that are not tensors too; NaN in both counts as the same."""
    nan = float("nan")
    states = [
        {"a": torch.zeros(2), "b": torch.tensor([nan, 1.0]), "c": torch.ones(2), "lr": 0.1},
        {"a": torch.zeros(3), "b": torch.tensor([nan, 1.0]), "d": torch.ones(1, dtype=torch.complex64), "lr": 0.2},
    ]
    with CheckpointManager(tmp_path / "run", ALL, state=lambda: states.pop(0)) as manager:
        manager.observe({}, step=1, epoch=0)
        manager.observe({}, step=2, epoch=1)
    data = command("diff", tmp_path / "run", 1, 2, "--json").data
    kinds = {change["name"]: change["kind"] for change in data["tensors"]}
    assert {"a": "reshaped", "b": "same", "c": "removed", "d": "added"} == kinds
    assert {"lr": [0.1, 0.2]} == data["values"]


# prune


@pytest.mark.parametrize("argv", [["plot"], ["report"]])
def test_a_picture_replaces_no_checkpoint_and_no_alias(tmp_path: Path, argv: list[str]) -> None:
    """A record still points to it, and a link to it is not followed either."""
    run = tmp_path / "run"
    train(run, 0.5, policy=Policy(EverySteps(1), [KeepAll()], last="link"))
    names = sorted(path.name for path in run.glob("*.ckpt"))
    before = snapshot(run)
    for name in names:
        said = command(*argv, run, run / name)
        assert (2, True) == (said.code, "and is not replaced; name a new file" in said.err)
    assert (True, before) == ("last.ckpt" in names, snapshot(run))


def test_prune_reports_first_and_removes_only_when_asked(run: Path, tmp_path: Path) -> None:
    """The output says what would be removed, and why. With --apply it is removed, and the others stay whole."""
    path = policy_file(tmp_path, Policy(EverySteps(1), [KeepBest(1, "loss", mode="min"), KeepLast(1)]))
    before = snapshot(run)
    said = command("prune", run, "-p", path)
    assert 0 == said.code
    why = "#2 of 4 by loss (min), beyond the best 1; 1 newer, beyond the last 1"
    assert f"drop  epoch=2-step=30.ckpt: {why}" in said.out
    assert "keep  epoch=1-step=20.ckpt: the best by loss (min)" in said.out
    assert "would remove 2 checkpoints" in said.out
    assert before == snapshot(run)

    data = command("prune", run, "-p", path, "--apply", "--json").data
    assert ["epoch=0-step=10.ckpt", "epoch=2-step=30.ckpt"] == data["removed"]
    assert [20, 40] == [item["step"] for item in command("ls", run, "--json").data]
    assert 0 == command("verify", run).code


def test_prune_refuses_a_rule_that_can_rank_nothing(run: Path, tmp_path: Path) -> None:
    """A metric that no checkpoint has would make it remove the best of them."""
    policy = tmp_path / "policy.yaml"
    policy.write_text("when:\n  EverySteps: {n: 1}\nkeep:\n- KeepBest: {k: 3, metric: eval_loss, mode: min}\n")
    before = snapshot(run)
    said = command("prune", run, "--policy", policy, "--apply")
    assert 2 == said.code
    assert "would keep none: no checkpoint of run" in said.err
    assert "(did you mean 'loss'?)" in said.err
    assert before == snapshot(run)


def test_prune_spares_pinned_aliased_foreign_and_other_runs(tmp_path: Path) -> None:
    """Only the run's own checkpoints go, and an alias never dangles."""
    folder = train(tmp_path / "run", 0.9, 0.2, 0.5, policy=ALL_LINKED)
    (folder / "notes.ckpt").write_bytes(b"mine")
    with CheckpointManager(folder, ALL, state=dict) as manager:
        manager.restore()
        manager.pin("epoch=0-step=10.ckpt")
    with pytest.warns(UserWarning, match="of other runs"), CheckpointManager(folder, ALL, state=dict) as manager:
        manager.observe({"loss": 0.1}, step=5, epoch=0)
    path = policy_file(tmp_path, Policy(EverySteps(1), [KeepBest(1, "loss", mode="min", after_step=1000)]))
    first = look_at(open_storage(folder, "")).runs[0][0]
    data = command("prune", folder, "-p", path, "--run", first, "--apply", "--json").data
    assert [] == data["removed"]
    kept = {"epoch=0-step=10.ckpt": "pinned", "epoch=1-step=20.ckpt": "best.ckpt points to it"}
    assert kept | {"epoch=2-step=30.ckpt": "last.ckpt points to it"} == data["kept"]
    data = command("prune", folder, "-p", path, "--apply", "--json").data
    assert ["epoch=0-step=5.ckpt"] == data["removed"]
    assert b"mine" == (folder / "notes.ckpt").read_bytes()
    assert torch.load(folder / "last.ckpt", weights_only=True)


def test_prune_leaves_what_is_abandoned_unless_asked(tmp_path: Path) -> None:
    """The user may want to go back there."""
    folder = train(tmp_path / "run", 0.9, 0.5, policy=ALL)
    with CheckpointManager(folder, ALL, state=dict) as manager:
        manager.restore(10)
        manager.observe({"loss": 0.7}, step=15, epoch=0)
    path = policy_file(tmp_path, ALL)
    assert [] == command("prune", folder, "-p", path, "--apply", "--json").data["removed"]
    data = command("prune", folder, "-p", path, "--abandoned", "--apply", "--json").data
    assert ["epoch=1-step=20.ckpt"] == data["removed"]
    assert "abandoned: the run went back to an earlier step" == data["going"]["epoch=1-step=20.ckpt"]


def test_prune_refuses_a_directory_that_a_live_manager_writes_to(tmp_path: Path) -> None:
    """It would remove what the other counts on."""
    path = policy_file(tmp_path, Policy(EverySteps(1), [KeepLast(1)]))
    with CheckpointManager(tmp_path / "run", POLICY, state=dict) as manager:
        for step in (1, 2, 3):
            manager.observe({"loss": 1 / step}, step=step, epoch=step)
        before = snapshot(tmp_path / "run")
        said = command("prune", tmp_path / "run", "-p", path, "--apply")
        assert (2, "") == (said.code, said.out)
        assert f"process {os.getpid()} is writing to" in said.err
        assert before == snapshot(tmp_path / "run")


def test_prune_removes_nothing_while_a_record_is_damaged(run: Path, tmp_path: Path) -> None:
    """The damaged one may be the best."""
    (run / ".checkpointer/records/epoch=1-step=20.ckpt.json").write_bytes(b"{")
    before = snapshot(run)
    said = command("prune", run, "-p", policy_file(tmp_path, Policy(EverySteps(1), [KeepLast(1)])), "--apply")
    assert (2, True) == (said.code, "nothing was removed" in said.err)
    assert before == snapshot(run)


# sweep

_DIE = """
import os, signal, sys
from checkpointer import CheckpointManager, EverySteps, KeepAll, Policy
class State(dict):
    def __reduce__(self):
        os.kill(os.getpid(), signal.SIGKILL)
manager = CheckpointManager(sys.argv[1], Policy(EverySteps(1), [KeepAll()]), state=lambda: {"a": State()})
manager.observe({}, step=1, epoch=0)
"""


@pytest.mark.parametrize("is_first", [False, True])
def test_sweep_removes_what_a_killed_process_left(run: Path, tmp_path: Path, *, is_first: bool) -> None:
    """Killed while it wrote, also in the first save of all: an unfinished payload, which no record names."""
    run = tmp_path / "new" if is_first else run
    killed = subprocess.run([sys.executable, "-W", "ignore", "-c", _DIE, str(run)], timeout=120)
    assert -signal.SIGKILL == killed.returncode
    staging = run / ".checkpointer" / "staging"
    assert any(staging.rglob("*"))
    said = command("sweep", run)
    assert (0, "1 unfinished write removed, 0 finished, 0 left\n") == (said.code, said.out)
    assert not any(path.is_file() for path in staging.rglob("*"))
    assert is_first or 0 == command("verify", run).code


# copy


def test_copy_brings_records_payloads_and_aliases(tmp_path: Path) -> None:
    """A training can go on from the copy as from the original."""
    folder = train(tmp_path / "run", 0.9, 0.2, 0.5, policy=ALL_LINKED)
    said = command("copy", folder, tmp_path / "copy", "--json")
    assert 0 == said.code
    assert {"last.ckpt": "epoch=2-step=30.ckpt", "best.ckpt": "epoch=1-step=20.ckpt"} == said.data["aliases"]
    ours, theirs = (look_at(open_storage(path, "")) for path in (folder, tmp_path / "copy"))
    assert (ours.records, dict(ours.aliases)) == (theirs.records, dict(theirs.aliases))
    assert (tmp_path / "copy" / "last.ckpt").is_symlink()
    assert 0 == command("verify", tmp_path / "copy", "--deep").code
    assert not (tmp_path / "copy" / ".checkpointer" / "staging").exists()  # Nothing is left of the copying.
    with CheckpointManager(tmp_path / "copy", ALL_LINKED, state=dict) as manager:
        restored = manager.restore()
        assert restored is not None
        assert 30 == restored.step
        manager.observe({"loss": 0.1}, step=40, epoch=3)
    assert not (folder / "epoch=3-step=40.ckpt").exists()


def test_copy_between_storages_and_back(run: Path, tmp_path: Path) -> None:
    """Any two."""
    url = f"memory://copy/{tmp_path.name}"
    assert 0 == command("copy", run, url).code
    assert 0 == command("copy", url, tmp_path / "back").code
    ours, theirs = (look_at(open_storage(path, "")) for path in (run, tmp_path / "back"))
    assert ours.records == theirs.records


@pytest.mark.parametrize("when", ["before", "halfway", "after"])
def test_copy_goes_on_where_it_was_interrupted(run: Path, when: Any) -> None:
    """Dead at every third operation in turn: the next copy brings the rest, and all of it is whole."""
    catalog = look_at(open_storage(run, ""))
    measured = CrashingStorage(MemoryStorage())
    copy(catalog, measured, new_owner())
    for number in range(1, measured.operations + 1, 3):
        memory, owner = MemoryStorage(), new_owner()
        with pytest.raises(Crash):
            copy(catalog, CrashingStorage(memory, at=number, when=when), owner)
        die(owner)
        done = copy(catalog, memory, new_owner())
        there = look_at(memory)
        assert (catalog.records, 4) == (there.records, len(done.missing) + len(done.there))
        assert all(verify_all(there, there.records))


def test_a_folder_is_copied_and_gone_on_with_where_there_are_only_files(tmp_path: Path) -> None:
    """A DCP folder to an object store: its files appear one by one, and count when the record does."""
    state = {"w": torch.arange(6.0), "b": torch.ones(2)}
    with CheckpointManager(tmp_path / "run", ALL, state=lambda: state, format="dcp") as manager:
        manager.observe({}, step=1, epoch=0)
    catalog = look_at(open_storage(tmp_path / "run", ""))
    measured = CrashingStorage(MemoryStorage())
    copy(catalog, measured, new_owner())
    for number in range(1, measured.operations + 1):
        memory, owner = MemoryStorage(), new_owner()
        with pytest.raises(Crash):
            copy(catalog, CrashingStorage(memory, at=number, when="after"), owner)
        die(owner)
        copy(catalog, memory, new_owner())
        assert catalog.records == look_at(memory).records
    url = f"memory://folder/{tmp_path.name}"
    assert 0 == command("copy", tmp_path / "run", url).code
    assert 0 == command("copy", url, tmp_path / "back").code
    assert 0 == command("verify", tmp_path / "back", "--deep").code
    assert 0 == command("diff", tmp_path / "run", 1, 1, "--in", tmp_path / "back").code


def test_copy_brings_all_but_what_is_damaged(tmp_path: Path) -> None:
    """Also what is newer: a person copies from a disk that dies."""
    run = train(tmp_path / "run", 0.9, 0.2, 0.5, policy=ALL_LINKED)
    payload = run / "epoch=1-step=20.ckpt"
    payload.write_bytes(b"?" + payload.read_bytes()[1:])
    said = command("copy", run, tmp_path / "copy")
    assert 1 == said.code
    assert f"damaged: epoch=1-step=20.ckpt in {run} has other bytes than its record says; it was not copied" in said.err
    assert "best.ckpt was not copied: epoch=1-step=20.ckpt is damaged" in said.err
    assert [10, 30] == [item["step"] for item in command("ls", tmp_path / "copy", "--json").data]
    assert 0 == command("verify", tmp_path / "copy").code
    again = command("copy", run, tmp_path / "copy", "--json")
    assert (1, ["epoch=1-step=20.ckpt"], []) == (again.code, again.data["damaged"], again.data["copied"])


def test_copy_replaces_nothing(run: Path, tmp_path: Path) -> None:
    """Neither a foreign file nor another's checkpoint; and it says so before it begins."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "epoch=1-step=20.ckpt").write_bytes(b"mine")
    before = snapshot(tmp_path / "there")
    said = command("copy", run, tmp_path / "there")
    assert (2, "") == (said.code, said.out)
    assert "has other files under the names epoch=1-step=20.ckpt; nothing was copied" in said.err
    assert before == snapshot(tmp_path / "there")
    assert "is the directory itself" in command("copy", run, run).err


class SmallStorage(MemoryStorage):
    """A disk with a few bytes left."""

    def free_space(self) -> int:
        return 1000


def test_a_destination_without_space_is_reported_before_anything_is_copied(run: Path) -> None:
    """Not after the third hour."""
    storage = SmallStorage()
    with pytest.raises(
        NotEnoughSpaceError, match=r"memory has 1.0 kB free, and 4 checkpoints need .* nothing was copied"
    ):
        copy(look_at(open_storage(run, "")), storage, "me")
    assert {} == storage.list()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small disk")
def test_a_full_destination_is_reported_and_left_as_it_was(run: Path, tmp_path: Path) -> None:
    """A real disk of 64 kB."""
    full = tmp_path / "full"
    full.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(full)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        (full / "filler").write_bytes(b"x" * 60_000)
        before = snapshot(full)
        said = command("copy", run, full)
        assert (2, "") == (said.code, said.out)
        assert "nothing was copied" in said.err
        assert before == snapshot(full)
    finally:
        subprocess.run(["umount", str(full)], check=True)


def test_signed_checkpoints_are_copied_with_their_key_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy without signatures would be refused later."""
    monkeypatch.setenv("CKPT_KEY", "0f3c5a" * 8)
    folder = train(tmp_path / "run", 0.5, trust=HMACKey.from_env("CKPT_KEY"))
    said = command("copy", folder, tmp_path / "copy")
    assert (2, True, False) == (
        said.code,
        "are signed; pass their key" in said.err,
        (tmp_path / "copy").exists(),
    )
    assert 0 == command("copy", folder, tmp_path / "copy", "--key-env", "CKPT_KEY").code
    assert 0 == command("verify", tmp_path / "copy", "--key-env", "CKPT_KEY").code


# adopt


def lightning_file(path: Path, step: int, score: float, monitor: str = "val_loss") -> None:
    """Write what Lightning writes, as far as adopt reads it."""
    best = {f"/moved/from/{path.name}": torch.tensor(score)}
    callback = {"monitor": monitor, "current_score": torch.tensor(score), "best_k_models": best}
    progress = {"fit_loop": {"epoch_progress": {"current": {"processed": step // 10}}}}
    torch.save(
        {
            "epoch": step // 10 - 1,
            "global_step": step,
            "pytorch-lightning_version": "2.6.6",
            "state_dict": {"w": torch.ones(2)},
            "optimizer_states": [{"state": {}}],
            "loops": progress,
            "callbacks": {f"ModelCheckpoint{{'monitor': '{monitor}', 'mode': 'min'}}": callback},
        },
        path,
    )


def test_adopt_reads_what_each_kind_of_writer_wrote(tmp_path: Path) -> None:
    """Step, epoch and scores come from the files; the files stay as they are."""
    folder = tmp_path / "old"
    folder.mkdir()
    lightning_file(folder / "epoch=1-step=20.ckpt", 20, 0.5)
    lightning_file(folder / "epoch=2-step=30-acc=0.75.ckpt", 30, 0.25)
    lightning_file(folder / "last.ckpt", 30, 0.25)
    torch.save({"epoch": 4, "model_state_dict": {"w": torch.ones(1)}, "loss": 0.125}, folder / "tutorial.pt")
    torch.save({"w": torch.ones(1)}, folder / "model_step_700.pth")
    torch.save({"w": torch.ones(1)}, folder / "nameless.pt")
    (folder / "checkpoint-500").mkdir()
    log = [{"step": 500, "epoch": 2.0, "eval_loss": 0.75}, {"step": 250, "eval_loss": 0.9}]
    state = {"global_step": 500, "epoch": 2.0, "log_history": log}
    (folder / "checkpoint-500" / "trainer_state.json").write_text(json.dumps(state))
    torch.save({"w": torch.ones(1)}, folder / "checkpoint-500" / "optimizer.pt")
    before = snapshot(folder)

    per_epoch = ("--steps-per-epoch", 500)
    shown = command("adopt", folder, "--dry-run", *per_epoch)
    assert (1, before) == (shown.code, snapshot(folder))
    said = command("adopt", folder, "--json", *per_epoch)

    assert 1 == said.code
    got = {item["name"]: (item["step"], item["epoch"], item["metrics"]) for item in said.data["adopted"]}
    assert {
        "tutorial.pt": (2500, 4, {"loss": 0.125}),
        "epoch=1-step=20.ckpt": (20, 1, {"val_loss": 0.5}),
        "epoch=2-step=30-acc=0.75.ckpt": (30, 2, {"acc": 0.75, "val_loss": 0.25}),
        "checkpoint-500": (500, 1, {"eval_loss": 0.75}),
        "model_step_700.pth": (700, 0, {}),
    } == got
    assert (["nameless.pt"], ["last.ckpt"]) == ([*said.data["refused"]], [*said.data["beside"]])
    assert "pass its step: --step NAME=STEP" in said.data["refused"]["nameless.pt"]
    assert before == {path: data for path, data in snapshot(folder).items() if not path.startswith(".checkpointer")}
    assert 0 == command("verify", folder, "--deep").code
    assert (
        f"{folder}/epoch=2-step=30-acc=0.75.ckpt\n" == command("best", folder, "--by", "val_loss", "--mode", "min").out
    )

    again = command("adopt", folder, "--step", "nameless.pt=900", "--json")
    assert [("nameless.pt", 900)] == [(item["name"], item["step"]) for item in again.data["adopted"]]


def test_what_was_adopted_can_be_restored_and_gone_on_with(tmp_path: Path) -> None:
    """It is a checkpoint like any other."""
    folder = tmp_path / "old"
    folder.mkdir()
    lightning_file(folder / "epoch=1-step=20.ckpt", 20, 0.5)
    assert 0 == command("adopt", folder).code
    with CheckpointManager(folder, ALL, state=dict) as manager:
        restored = manager.restore()
        assert restored is not None
        assert (20, 2.0) == (restored.step, restored.state["state_dict"]["w"].sum().item())


def test_adopt_runs_nothing_that_is_in_the_files(tmp_path: Path) -> None:
    """adopt is for directories of other programs."""

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "pwned"),)

    folder = tmp_path / "old"
    folder.mkdir()
    torch.save({"step": 7, "w": torch.ones(1), "bomb": Bomb()}, folder / "a.pt")
    assert 0 == command("adopt", folder).code
    assert not (tmp_path / "pwned").exists()


def test_adopt_of_nothing_says_what_it_looks_for(tmp_path: Path) -> None:
    """An empty directory, and one of other files."""
    said = command("adopt", tmp_path)
    assert (2, True) == (said.code, "has no file that could be adopted" in said.err)


# export and average


def test_export_writes_the_weights_as_safetensors_or_torch(run: Path, tmp_path: Path) -> None:
    """Under the names that the model knows them by."""
    expected = torch.arange(6.0).reshape(2, 3) * 0.2
    assert 0 == command("export", run, 20, tmp_path / "w.safetensors").code
    assert torch.equal(expected, load_file(tmp_path / "w.safetensors")["w"])
    assert 0 == command("export", run, 20, tmp_path / "w.pt").code
    plain = torch.load(tmp_path / "w.pt", weights_only=True, mmap=True)
    assert (["w", "b"], True) == (list(plain), torch.equal(expected, plain["w"]))
    every = command("export", run, 20, tmp_path / "all.safetensors", "--only", "", "--json").data
    assert (2, "") == (every["tensors"], every["key"])


def test_export_never_writes_over_a_file_and_leaves_none_behind(run: Path, tmp_path: Path) -> None:
    """Nor does it guess which key holds the weights."""
    (tmp_path / "w.pt").write_bytes(b"mine")
    assert "is there already" in command("export", run, 20, tmp_path / "w.pt").err
    assert b"mine" == (tmp_path / "w.pt").read_bytes()
    said = command("export", run, 20, tmp_path / "x.pt", "--only", "modle")
    assert (2, True) == (said.code, "there is no tensor under 'modle'; the payload has model (" in said.err)
    assert ["policy.yaml"] != os.listdir(tmp_path)
    assert not [name for name in os.listdir(tmp_path) if name.startswith((".x", "x"))]


def test_every_dtype_survives_a_streamed_torch_file(tmp_path: Path) -> None:
    """torch reads it as it reads its own; the bytes are aligned for mapping."""
    dtypes = (torch.float64, torch.bfloat16, torch.uint16, torch.bool, torch.complex64, torch.float8_e4m3fn)
    tensors = {str(dtype): torch.ones(3, 2).to(dtype) for dtype in dtypes} | {
        "0-d": torch.tensor(5),
        "empty": torch.ones(0),
    }
    infos = {
        name: TensorInfo(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape))
        for name, tensor in tensors.items()
    }
    write_weights(tmp_path / "a.pt", infos, tensors.__getitem__)
    for mapped in (False, True):
        loaded = torch.load(tmp_path / "a.pt", weights_only=True, mmap=mapped)
        for name, tensor in tensors.items():
            assert (tensor.dtype, tensor.shape) == (loaded[name].dtype, loaded[name].shape)
            assert (
                torch.equal(tensor.flatten().view(torch.uint8), loaded[name].flatten().view(torch.uint8))
                or not tensor.ndim
            )
        assert 0 == loaded["torch.float64"].data_ptr() % 8
    with open_contents(LocalStorage(tmp_path, ""), "a.pt") as contents:
        assert (infos, []) == (dict(contents.tensors), list(contents.problems()))


def test_average_is_the_mean_of_the_best(run: Path, tmp_path: Path) -> None:
    """Losses 0.2 and 0.5 are the best two, and the weights are in proportion."""
    out = tmp_path / "mean.safetensors"
    said = command("average", run, "--best", 2, "--by", "loss", "--mode", "min", "--out", out, "--json")
    assert ["epoch=1-step=20.ckpt", "epoch=2-step=30.ckpt"] == said.data["of"]
    assert torch.allclose(torch.arange(6.0).reshape(2, 3) * 0.35, load_file(out)["w"])
    named = command("average", run, 10, 40, "--out", tmp_path / "named.pt")
    assert 0 == named.code
    assert torch.allclose(
        torch.arange(6.0).reshape(2, 3) * 0.8, torch.load(tmp_path / "named.pt", weights_only=True)["w"]
    )


def test_counters_are_those_of_the_first_and_models_must_be_the_same(tmp_path: Path) -> None:
    """A mean of step counts means nothing, and one of two architectures even less."""
    states: list[Any] = [
        {"model": {"n": torch.tensor(1), "w": torch.ones(2)}},
        {"model": {"n": torch.tensor(3), "w": torch.zeros(2)}},
        {"model": {"w": torch.zeros(3)}},
    ]
    with CheckpointManager(tmp_path / "run", ALL, state=lambda: states.pop(0)) as manager:
        for step in (1, 2, 3):
            manager.observe({}, step=step, epoch=step)
    assert 0 == command("average", tmp_path / "run", 1, 2, "--out", tmp_path / "a.safetensors").code
    assert {"n": 1, "w": [0.5, 0.5]} == {k: v.tolist() for k, v in load_file(tmp_path / "a.safetensors").items()}
    said = command("average", tmp_path / "run", 1, 3, "--out", tmp_path / "b.safetensors")
    assert (2, True) == (said.code, "epoch=3-step=3.ckpt has no 'n'; average checkpoints of one model" in said.err)
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize(
    "argv", [["export", "{run}", "10", "{out}"], ["average", "{run}", "10", "20", "--out", "{out}"]]
)
def test_weights_are_not_written_under_an_unknown_extension(argv: list[str], run: Path, tmp_path: Path) -> None:
    """The extension says what is in the file, or ``--format`` does; upper case is the same."""
    for name in ("w.onnx", "w", "w.npz", "w.h5"):
        said = command(*(arg.format(run=run, out=tmp_path / name) for arg in argv))
        assert (2, True) == (said.code, "is not known; expected .safetensors, or one of a torch file" in said.err)
        assert not (tmp_path / name).exists()
    assert 0 == command(*(arg.format(run=run, out=tmp_path / "w.onnx") for arg in argv), "--format", "torch").code
    assert torch.is_tensor(torch.load(tmp_path / "w.onnx", weights_only=True)["w"])
    assert 0 == command(*(arg.format(run=run, out=tmp_path / "W.SAFETENSORS") for arg in argv)).code
    assert "w" in load_file(tmp_path / "W.SAFETENSORS")


@pytest.mark.parametrize(("verb", "name"), [("plot", "run.gif"), ("plot", "run.bmp"), ("report", "run.pdf")])
def test_a_picture_or_page_is_not_written_under_another_extension(
    verb: str, name: str, run: Path, tmp_path: Path
) -> None:
    """The extension is the format, so one that cannot be written is refused before anything is drawn."""
    said = command(verb, run, tmp_path / name)
    assert (2, True) == (said.code, "name a file with such an extension" in said.err)
    assert not (tmp_path / name).exists()


def test_average_asks_for_what_it_needs(run: Path, tmp_path: Path) -> None:
    """A file to write, and which checkpoints."""
    assert "--out is missing" in command("average", run, 10).err
    assert "name the checkpoints, or pass --best K" in command("average", run, "--out", tmp_path / "a.pt").err
    assert "which is best?" in command("average", run, "--best", 2, "--out", tmp_path / "a.pt").err


def test_no_bad_payload_is_exported(run: Path, tmp_path: Path) -> None:
    """It is verified first."""
    data = bytearray((run / "epoch=1-step=20.ckpt").read_bytes())
    data[-300] ^= 1
    (run / "epoch=1-step=20.ckpt").write_bytes(data)
    said = command("export", run, 20, tmp_path / "w.pt")
    assert (2, True) == (said.code, "has other bytes than were written" in said.err)
    assert not (tmp_path / "w.pt").exists()


# Everywhere


@pytest.mark.parametrize(
    "argv",
    [
        ["prune", "{}", "-p", "{p}", "--apply"],
        ["sweep", "{}"],
        ["copy", "{}", "{out}"],
        ["diff", "{}", "1", "2"],
        ["export", "{}", "1", "{out}"],
        ["average", "{}", "1", "--out", "{out}"],
    ],
)
@pytest.mark.parametrize("kind", ["none", "empty", "foreign"])
def test_a_directory_that_is_no_good_is_said_and_nothing_is_made(argv: list[str], kind: str, tmp_path: Path) -> None:
    """No directory appears where one was misspelt."""
    for name in ("empty", "foreign"):
        (tmp_path / name).mkdir()
    (tmp_path / "foreign" / "a.pt").write_bytes(b"x")
    path = policy_file(tmp_path, ALL)
    before = snapshot(tmp_path), sorted(os.listdir(tmp_path))
    places = {"p": path, "out": tmp_path / "out"}
    said = command(*(arg.format(tmp_path / kind, **places) for arg in argv))
    assert (2, "") == (said.code, said.out)
    assert before == (snapshot(tmp_path), sorted(os.listdir(tmp_path)))
