"""Adopting: what may be made a record of, which score and step are a file's own, and what is left."""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.commands import command, snapshot, train
from support.odd_files import tensor, torch_file

from checkpointer import CheckpointManager, EverySteps, HMACKey, KeepAll, Naming, Policy
from checkpointer.commit.index import record_path
from checkpointer.commit.journal import Journal
from checkpointer.errors import NotFoundError, PolicyError, UntrustedError
from checkpointer.storage import open_storage
from checkpointer.tools.adopt import Adoption, adopt, find_foreign
from checkpointer.tools.adopt_names import numbers_in, only_number_in
from checkpointer.tools.catalog import look_at

WEIGHTS = {"w": torch.ones(2)}


def found_in(folder: Path, **steps: Any) -> Adoption:
    """What can be adopted in a folder."""
    return find_foreign(look_at(open_storage(folder, "")), **steps)


def said_by(folder: Path) -> dict[str, tuple[int | None, int, dict[str, float]]]:
    """Step, epoch and metrics by name."""
    return {item.name: (item.step, item.epoch or 0, dict(item.metrics)) for item in found_in(folder).found}


def save(path: Path, state: Any = WEIGHTS) -> None:
    """Write a torch file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)


def lightning(path: Path, step: int, **callbacks: Any) -> None:
    """Write what Lightning writes, as far as adopt reads it."""
    state = {"global_step": step, "epoch": step // 10 - 1, "pytorch-lightning_version": "2.6.6", "state_dict": WEIGHTS}
    save(path, {**state, "optimizer_states": [{"state": {}}], "callbacks": callbacks})


def callback(monitor: str, **scores: float) -> dict[str, Any]:
    """The state of a ModelCheckpoint that has written these files; its last score was 0.2."""
    best = {f"/elsewhere/run/{name}.ckpt": torch.tensor(score) for name, score in scores.items()}
    return {"monitor": monitor, "current_score": torch.tensor(0.2), "best_k_models": best}


# Directories that have an owner


def test_runs_below_a_directory_are_never_adopted(tmp_path: Path) -> None:
    """Their checkpoints have records already; a foreign file beside them is adopted alone."""
    train(tmp_path / "digits", 0.9, 0.2)
    train(tmp_path / "old" / "deep" / "mnist", 0.5)
    assert ((), {}) == (found_in(tmp_path).found, dict(found_in(tmp_path).refused))
    save(tmp_path / "old" / "step_7.pt")
    assert ["old/step_7.pt"] == [item.name for item in found_in(tmp_path).found]
    assert 0 == command("adopt", tmp_path).code
    assert 0 == command("verify", tmp_path / "digits").code


def test_a_folder_within_a_managed_directory_owns_nothing(tmp_path: Path) -> None:
    """The record of the directory above says whose the files are."""
    with CheckpointManager(
        tmp_path, Policy(EverySteps(1), [KeepAll()], name="kept/{step}"), state=lambda: WEIGHTS
    ) as manager:
        manager.observe({}, step=1, epoch=0)
    refused = found_in(tmp_path / "kept").refused
    assert [f"it is a checkpoint of the directory {tmp_path}, which has a record of it"] == list(refused.values())


def test_every_folder_becomes_a_run_of_its_own(tmp_path: Path) -> None:
    """As one run, a policy would empty one of two experiments."""
    for name in ("a", "b"):
        for step in (1, 2):
            save(tmp_path / name / f"step_{step}.pt")
    adopted = command("adopt", tmp_path, "--json").data["adopted"]
    assert [1, 1] == [len({item["run"] for item in adopted if item["name"].startswith(name)}) for name in ("a/", "b/")]
    assert 2 == len({item["run"] for item in adopted})


# Scores


def test_only_the_callback_that_wrote_a_file_gives_its_score(tmp_path: Path) -> None:
    """The other one's current score is of another checkpoint."""
    by_loss, by_acc = callback("val_loss", a=0.5), callback("val_acc", b=0.9)
    lightning(tmp_path / "run" / "a.ckpt", 10, first=by_loss, second=by_acc)
    lightning(tmp_path / "run" / "b.ckpt", 20, first=by_loss, second=by_acc)
    lightning(tmp_path / "run" / "c.ckpt", 30, first=by_loss, second=by_acc)
    got = {name: metrics for name, (_, _, metrics) in said_by(tmp_path / "run").items()}
    assert {"a.ckpt": {"val_loss": 0.5}, "b.ckpt": {"val_acc": pytest.approx(0.9)}, "c.ckpt": {}} == got


def test_the_file_name_is_not_overruled_by_another_score(tmp_path: Path) -> None:
    """But the digits that it has rounded away are taken."""
    scores = {"epoch=0-val_loss=0.60": 0.6021, "epoch=1-val_loss=0.60": 0.2}
    for number, name in enumerate(scores, start=1):
        lightning(tmp_path / f"{name}.ckpt", number * 10, first=callback("val_loss", **scores))
    got = said_by(tmp_path)
    assert pytest.approx(0.6021) == got["epoch=0-val_loss=0.60.ckpt"][2]["val_loss"]
    assert 0.6 == got["epoch=1-val_loss=0.60.ckpt"][2]["val_loss"]


def test_of_two_files_with_one_name_the_one_in_the_same_folder_is_meant(tmp_path: Path) -> None:
    """Moved directories keep the ends of their paths."""
    state = {"monitor": "loss", "best_k_models": {"/old/one/best.ckpt": torch.tensor(0.5)}}
    other = {"monitor": "loss", "best_k_models": {"/old/two/best.ckpt": torch.tensor(0.25)}}
    for place in ("new/one", "new/two", "three"):
        lightning(tmp_path / place / "best.ckpt", 10, first=state, second=other)
    got = said_by(tmp_path)
    assert [{"loss": 0.5}, {"loss": 0.25}, {}] == [
        got[f"{place}/best.ckpt"][2] for place in ("new/one", "new/two", "three")
    ]


def test_the_best_score_so_far_is_not_the_file_s_own(tmp_path: Path) -> None:
    """And iter_num counts steps: both are what nanoGPT and the ImageNet example write."""
    save(tmp_path / "ckpt.pt", {"model": WEIGHTS, "iter_num": 2000, "best_val_loss": torch.tensor(1.5), "loss": 2.5})
    save(tmp_path / "b" / "c.pth", {"model": WEIGHTS, "step": 5, "best_acc1": 0.9})
    assert {"ckpt.pt": (2000, 0, {"loss": 2.5}), "b/c.pth": (5, 0, {})} == said_by(tmp_path)


# Steps


def test_numpy_scalars_are_read(tmp_path: Path) -> None:
    """Without numpy, and without unpickling."""
    state = {"epoch": np.int64(1), "step": np.int32(20), "val_loss": np.float64(0.25), "f1": np.float32(0.5)}
    for protocol in (2, 4):
        torch.save({"model": WEIGHTS, **state}, tmp_path / f"p{protocol}-{protocol}.pt", pickle_protocol=protocol)
        assert {f"p{protocol}-{protocol}.pt": (20, 1, {"val_loss": 0.25, "f1": 0.5})} == said_by(tmp_path)
        (tmp_path / f"p{protocol}-{protocol}.pt").unlink()


def test_counters_one_level_down_are_read(tmp_path: Path) -> None:
    """mmengine's in meta, ignite's in the trainer's state."""
    save(tmp_path / "epoch_4.pth", {"meta": {"epoch": 4, "iter": 2000, "seed": 0}, "state_dict": WEIGHTS})
    trainer = OrderedDict(epoch_length=100, max_epochs=5, iteration=300)
    save(tmp_path / "checkpoint_300.pt", {"trainer": trainer, "model": WEIGHTS})
    assert {"epoch_4.pth": (2000, 3, {}), "checkpoint_300.pt": (300, 2, {})} == said_by(tmp_path)


def test_an_epoch_alone_is_no_step(tmp_path: Path) -> None:
    """It is asked for, for one file or for all."""
    for epoch in (3, 4):
        save(tmp_path / f"epoch_{epoch}.pth")
    refused = found_in(tmp_path).refused
    assert "it has an epoch (4) and no step; pass its step: --step NAME=STEP, or" in refused["epoch_4.pth"]
    said = command("adopt", tmp_path, "--steps-per-epoch", 500, "--json").data
    assert [(2000, 3), (2500, 4)] == [(item["step"], item["epoch"]) for item in said["adopted"]]


def test_a_step_for_a_name_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """Not a step that nothing gets."""
    save(tmp_path / "a.pt")
    with pytest.raises(
        NotFoundError, match=r"b\.pt is given a step, but no file or folder to adopt has that name .*have: a\.pt"
    ):
        found_in(tmp_path, steps={"b.pt": 5})


def test_the_format_is_what_the_bytes_are(tmp_path: Path) -> None:
    """skorch writes safetensors to params.pt; what was adopted can be restored."""
    save_file(WEIGHTS, tmp_path / "params.pt")
    assert 0 == command("adopt", tmp_path, "--step", "params.pt=5").code
    with CheckpointManager(tmp_path) as manager:
        restored = manager.restore(contents="any")
        assert restored is not None
        assert ("safetensors", [1.0, 1.0]) == (restored.record.format, restored.state["w"].tolist())


@pytest.mark.parametrize(
    ("name", "number", "scores"),
    [
        ("ckpt_1000.pt", 1000, {}),
        ("model-10.pt", 10, {}),
        ("G_1000.pth", 1000, {}),
        ("checkpoint-500.pth.tar", 500, {}),
        ("best_model_5_acc=0.9.pt", 5, {"acc": 0.9}),
        ("best_acc=0.9.pt", None, {"acc": 0.9}),
        ("top_5_acc=0.9.pt", None, {"top_5_acc": 0.9}),
        ("epoch=2_step=300_val=0.12.pt", None, {"epoch": 2, "step": 300, "val": 0.12}),
        ("epoch=1-val/acc=-0.5.ckpt", None, {"epoch": 1, "val/acc": -0.5}),
        ("resnet_50.pt", None, {}),
        ("model_v2.pt", None, {}),
        ("model_20_0.75.pt", None, {}),
        ("epoch_3.pth", None, {"epoch": 3}),
    ],
)
def test_what_a_name_says(name: str, number: int | None, scores: dict[str, float]) -> None:
    """A number counts only where the rest of the name says nothing else."""
    assert (number, scores) == (only_number_in(f"runs/{name}"), numbers_in(f"runs/{name}"))


def test_a_number_is_no_step_beside_files_with_a_step_of_their_own(tmp_path: Path) -> None:
    """It may count epochs; the message has the pattern to pass."""
    save(tmp_path / "checkpoint_8.pt", {"model": WEIGHTS, "step": 8})
    save(tmp_path / "best_model_2_acc=0.75.pt")
    reason = found_in(tmp_path).refused["best_model_2_acc=0.75.pt"]
    assert "its number 2 may be a step or an epoch" in reason
    assert "--pattern 'best_model_{epochs}_acc={acc}.pt' if so many epochs are finished" in reason
    said = command("adopt", tmp_path, "--pattern", "best_model_{epochs}_acc={acc}.pt", "--steps-per-epoch", 4, "--json")
    assert [(8, 0, {}), (8, 1, {"acc": 0.75})] == sorted(
        ((item["step"], item["epoch"], item["metrics"]) for item in said.data["adopted"]), key=str
    )


@pytest.mark.parametrize(("field", "expected"), [("epoch", (12, 2, True)), ("epochs", (8, 1, True)), (None, None)])
def test_a_number_is_an_index_of_an_epoch_or_how_many_are_finished(
    tmp_path: Path, field: str | None, expected: tuple[int, int, bool] | None
) -> None:
    """`--steps-per-epoch` counts finished epochs, and refuses to do nothing: the number would become the step."""
    save(tmp_path / "model_2.pt")
    if field is None:
        with pytest.raises(
            PolicyError, match=r"model_2.pt has its number 2 as its step; .*--pattern 'model_\{epochs\}.pt'"
        ):
            found_in(tmp_path, steps_per_epoch=4)
        return
    (found,) = found_in(tmp_path, patterns=[f"model_{{{field}}}.pt"], steps_per_epoch=4).found
    assert expected == (found.step, found.epoch, found.epoch_end)


def test_steps_of_an_epoch_that_no_file_needs_are_named(tmp_path: Path) -> None:
    """The files hold their steps; a file without an epoch has none to name."""
    save(tmp_path / "a.pt", {"model": WEIGHTS, "step": 7})
    said = command("adopt", tmp_path, "--steps-per-epoch", 4)
    assert "--steps-per-epoch 4 has no effect: no file has an epoch without a step" in said.err
    assert (0, "adopted  a.pt: step 7 (torch.save)") == (said.code, said.out.splitlines()[0])


def test_an_adoption_is_undone_by_removing_its_records(tmp_path: Path) -> None:
    """The files were never changed, and can be adopted anew."""
    for number in (1, 2):
        save(tmp_path / f"model_{number}.pt")
    assert 0 == command("adopt", tmp_path).code
    (tmp_path / record_path("model_2.pt")).unlink()
    assert 0 == command("adopt", tmp_path, "--step", "model_2.pt=200").code
    assert [("model_1.pt", 1), ("model_2.pt", 200)] == [
        (one["name"], one["step"]) for one in command("ls", tmp_path, "--json").data
    ]
    shutil.rmtree(tmp_path / ".checkpointer")
    assert 2 == len(found_in(tmp_path).found)


def test_a_pattern_takes_precedence_over_the_file(tmp_path: Path) -> None:
    """It is what a person says; a folder may hold the number."""
    save(tmp_path / "exp" / "20" / "model_0.75.pt", {"model": WEIGHTS, "step": 3, "loss": 0.5})
    adopted = found_in(tmp_path, patterns=["{step}/model_{acc:.2f}"]).found
    assert [(20, {"loss": 0.5, "acc": 0.75})] == [(item.step, dict(item.metrics)) for item in adopted]


def test_a_step_of_a_pattern_that_no_record_has_is_named(tmp_path: Path) -> None:
    """The others are adopted, to the last digit."""
    for step in (2**53 + 1, 10**200):
        save(tmp_path / f"own-{step}-.pt")
    adoption = found_in(tmp_path, patterns=["own-{step}-.pt"])
    assert [2**53 + 1] == [item.step for item in adoption.found]
    assert [f"own-{10**200}-.pt"] == [*adoption.refused]


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("model_{step", "has a brace without its other half"),
        ("model.pt", "has no field"),
        ("model_{}.pt", "has a field without a name"),
        ("{step}_{step}.pt", r"has the field \{step\} twice"),
        ("{epoch}{step}.pt", "two fields with no text between them"),
        ("ckpt-{step}.pt", r"no name fits the pattern 'ckpt-\{step\}.pt'; there are: a_5.pt"),
    ],
)
def test_a_bad_pattern_is_an_error_that_says_why(tmp_path: Path, pattern: str, problem: str) -> None:
    """And nothing is adopted."""
    save(tmp_path / "a_5.pt")
    with pytest.raises(PolicyError, match=problem):
        found_in(tmp_path, patterns=[pattern])
    said = command("adopt", tmp_path, "--pattern", pattern)
    assert (2, False) == (said.code, (tmp_path / ".checkpointer").exists())


# Aliases


@pytest.mark.parametrize("how", ["copy", "link"])
def test_a_last_file_with_the_bytes_of_another_is_an_alias(tmp_path: Path, how: str) -> None:
    """Commands show it, a manager that goes on re-points it, and a second time adopts nothing."""
    save(tmp_path / "step_10.pt", {"model": WEIGHTS, "step": 10})
    save(tmp_path / "step_20.pt", {"model": WEIGHTS, "step": 20})
    if how == "link":
        (tmp_path / "last.pt").symlink_to("step_20.pt")
    else:
        shutil.copy(tmp_path / "step_20.pt", tmp_path / "last.pt")
    assert {"last.pt": "step_20.pt"} == command("adopt", tmp_path, "--json").data["aliases"]
    assert [[], ["last.pt"]] == [one["aliases"] for one in command("ls", tmp_path, "--json").data]
    again = command("adopt", tmp_path)
    assert (0, True) == (again.code, "0 checkpoints adopted, 2 had a record already" in again.out)
    policy = Policy(EverySteps(1), [KeepAll()], last="link", name=Naming("{step}", auto_insert=False, extension=".pt"))
    with CheckpointManager(tmp_path, policy, state=lambda: WEIGHTS) as manager:
        assert manager.restore(contents="any") is not None
        manager.observe({}, step=30, epoch=0)
    assert "30.pt" == Path(tmp_path / "last.pt").resolve().name


@pytest.mark.parametrize("how", ["cp -a", "cp -r", "cp -r, and last.pt has other bytes"])
def test_an_alias_is_known_in_a_copy_of_the_directory(tmp_path: Path, how: str) -> None:
    """``cp -a`` keeps the time of the file. After another copy ``adopt`` compares the bytes once more."""
    old, new = tmp_path / "old", tmp_path / "new"
    save(old / "step_10.pt", {"model": WEIGHTS, "step": 10})
    shutil.copy(old / "step_10.pt", old / "last.pt")
    assert 0 == command("adopt", old).code
    shutil.copytree(old, new, copy_function=shutil.copy2 if how == "cp -a" else shutil.copy)
    if how.endswith("other bytes"):
        save(new / "last.pt", {"model": {"w": WEIGHTS["w"] + 1}, "step": 10})

    def aliases() -> list[list[str]]:
        return [one["aliases"] for one in command("ls", new, "--json").data]

    assert ([["last.pt"]] if how == "cp -a" else [[]]) == aliases()
    again = command("adopt", new)
    assert (0, "0 checkpoints adopted, 1 had a record already" in again.out) == (again.code, True)
    assert ([[]] if how.endswith("other bytes") else [["last.pt"]]) == aliases()


def test_an_epoch_that_is_not_known_is_left_out(tmp_path: Path) -> None:
    """It is not epoch 0."""
    save(tmp_path / "a" / "step_10.pt", {"model": WEIGHTS, "step": 10})
    save(tmp_path / "b" / "step_20.pt", {"model": WEIGHTS, "step": 20, "epoch": 0})
    assert 0 == command("adopt", tmp_path).code
    assert [None, 0] == [one["epoch"] for one in command("ls", tmp_path, "--json").data]
    head, first, _, second, _ = command("ls", tmp_path).out.splitlines()[1:]
    cells = [line[head.index("epoch") : head.index("epoch") + 5].strip() for line in (first, second)]
    assert ["", "0"] == cells
    steps = [command("show", tmp_path, step).out.splitlines()[2].split() for step in (10, 20)]
    assert [["step", "10"], ["step", "20", "(epoch", "0,", "ended)"]] == steps
    assert [False, True] == [record.is_epoch_known for record in look_at(open_storage(tmp_path, "")).records]


def test_what_has_a_record_is_not_adopted_anew_and_adopt_says_so(tmp_path: Path) -> None:
    """A person notices a wrong step after the adoption."""
    save(tmp_path / "model_5_0.75.pt")
    assert 0 == command("adopt", tmp_path, "--pattern", "model_{step}_{acc}.pt").code
    said = command("adopt", tmp_path, "--pattern", "model_{epochs}_{acc}.pt", "--steps-per-epoch", 8)
    assert "to adopt a file anew, remove its record, such as .checkpointer/records/model_5_0.75.pt.json" in said.err
    assert "there are: model_5_0.75.pt" in command("adopt", tmp_path, "--pattern", "x_{step}.pt").err


def test_an_alias_whose_file_was_replaced_is_not_believed(tmp_path: Path) -> None:
    """The trainer has written another last file meanwhile."""
    save(tmp_path / "step_10.pt", {"model": WEIGHTS, "step": 10})
    shutil.copy(tmp_path / "step_10.pt", tmp_path / "last.pt")
    assert 0 == command("adopt", tmp_path).code
    save(tmp_path / "last.pt", {"model": WEIGHTS, "step": 99})
    assert [[]] == [one["aliases"] for one in command("ls", tmp_path, "--json").data]


def test_a_link_out_of_the_directory_or_to_no_checkpoint_is_left(tmp_path: Path) -> None:
    """With where it leads."""
    save(tmp_path / "elsewhere.pt")
    save(tmp_path / "run" / "step_1.pt")
    (tmp_path / "run" / "out.pt").symlink_to("../elsewhere.pt")
    save(tmp_path / "run" / "nameless.pt")
    (tmp_path / "run" / "inner.pt").symlink_to("nameless.pt")
    refused = found_in(tmp_path / "run").refused
    assert "which is outside the directory" in refused["out.pt"]
    assert "it is a link to nameless.pt, which has no record" == refused["inner.pt"]


# What belongs together


def accelerate(folder: Path) -> None:
    """What ``accelerator.save_state`` writes."""
    folder.mkdir(parents=True)
    save_file(WEIGHTS, folder / "model.safetensors")
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        save(folder / name)


def speechbrain(folder: Path) -> None:
    """What its Checkpointer writes."""
    for name in ("model.ckpt", "counter.ckpt", "optimizer.ckpt"):
        save(folder / name)
    (folder / "CKPT.yaml").write_text("end-of-epoch: true\n")


def export(folder: Path) -> None:
    """What ``save_pretrained`` writes, in shards."""
    folder.mkdir(parents=True)
    for number in (1, 2):
        save_file(WEIGHTS, folder / f"model-0000{number}-of-00002.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text("{}")


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (accelerate, "checkpoint_4"),
        (accelerate, "my_state"),
        (speechbrain, "CKPT+2024-05-01+10-00-00+00"),
    ],
)
def test_a_folder_is_adopted_as_a_whole_or_left(tmp_path: Path, write: Any, name: str) -> None:
    """Never a file out of it, whatever step is given."""
    write(tmp_path / name)
    left = found_in(tmp_path)
    assert ((), [name]) == (left.found, list(left.refused))
    assert "it is a folder of files that belong together" in left.refused[name]
    part = next(path.name for path in (tmp_path / name).iterdir() if path.suffix in (".safetensors", ".ckpt"))
    said = command("adopt", tmp_path, "--step", f"{name}/{part}=100")
    assert (2, True) == (said.code, f"is a part of {name}, which is adopted as a whole" in said.err)
    assert 0 == command("adopt", tmp_path, "--step", f"{name}=100").code
    (record,) = look_at(open_storage(tmp_path, "")).records
    assert (name, "folder", 100) == (record.name, record.format, record.step)
    assert 0 == command("verify", tmp_path).code


def saved_model(folder: Path) -> None:
    """Write what ``trainer.save_model()`` writes."""
    folder.mkdir(parents=True)
    save_file({"w": torch.zeros(2)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    torch.save({}, folder / "training_args.bin")


def trainers_checkpoint(folder: Path, step: int) -> None:
    """Write what the HF Trainer writes, as far as adopt reads it."""
    saved_model(folder)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "epoch": 1.0, "log_history": []}))
    torch.save({"state": {}}, folder / "optimizer.pt")


@pytest.mark.parametrize("write", [saved_model, export])
@pytest.mark.parametrize("name", ["final", "bert", "best_model"])
def test_a_model_alone_beside_checkpoints_is_left_and_is_no_failure(tmp_path: Path, write: Any, name: str) -> None:
    """It has no step, and no resume could go on from it. A step that is given adopts it, as weights."""
    trainers_checkpoint(tmp_path / "checkpoint-20", 20)
    write(tmp_path / name)
    said = command("adopt", tmp_path)
    assert (0, True) == (said.code, f"left  {name}: it is a model alone, as trainer.save_model() writes it" in said.out)
    assert 0 == command("adopt", tmp_path, "--step", f"{name}=20").code
    records = {record.name: record.contents for record in look_at(open_storage(tmp_path, "")).records}
    assert {"checkpoint-20": "full", name: "weights"} == records


def test_a_directory_with_a_model_alone_has_nothing_to_adopt(tmp_path: Path) -> None:
    """The exit code says so."""
    saved_model(tmp_path / "final")
    assert 1 == command("adopt", tmp_path).code


def test_parts_of_the_directory_itself_are_left(tmp_path: Path) -> None:
    """The export, or the state, is named as the directory."""
    export(tmp_path / "bert")
    accelerate(tmp_path / "state")
    for folder in ("bert", "state"):
        left = found_in(tmp_path / folder)
        assert ((), {}) == (left.found, left.refused)
        assert {} != left.beside
        assert all("belongs together" in why or "shards" in why for why in left.beside.values())
    with pytest.raises(NotFoundError, match="cannot be adopted alone"):
        found_in(tmp_path / "state", steps={"model.safetensors": 5})


def test_a_collection_in_a_folder_is_adopted_file_by_file(tmp_path: Path) -> None:
    """A configuration beside it makes no unit of it."""
    for step in (100, 200):
        save(tmp_path / "exp" / f"step_{step}.pt")
    (tmp_path / "exp" / "config.json").write_text("{}")
    assert ["exp/step_100.pt", "exp/step_200.pt"] == list(said_by(tmp_path))


@pytest.mark.parametrize("state", [{}, {"step": 30}], ids=["epoch", "step"])
def test_two_parts_of_one_step_are_left(tmp_path: Path, state: dict[str, Any]) -> None:
    """As two checkpoints of one run, prune would remove all of one half."""
    for epoch in (2, 3):
        for net in ("netD", "netG"):
            save(tmp_path / f"{net}_epoch_{epoch}.pth", {**WEIGHTS, **dict.fromkeys(state, epoch)})
    for adoption in (found_in(tmp_path), found_in(tmp_path, steps_per_epoch=10)):
        assert (4, ()) == (len(adoption.refused), adoption.found)
        assert "has the same step as netD_epoch_3.pth: they are parts" in adoption.refused["netG_epoch_3.pth"]
    with_one = found_in(tmp_path, steps={"netD_epoch_3.pth": 300})
    assert (4, ()) == (len(with_one.refused), with_one.found)


def test_files_with_equal_numbers_are_of_the_steps_that_are_given(tmp_path: Path) -> None:
    """A step that is given for each file overrules the guess that equal numbers in two names are one step."""
    for name in ("first_1.pt", "second_1.pt"):
        save(tmp_path / name)
    given = {"first_1.pt": 10, "second_1.pt": 20}
    assert [("first_1.pt", 10), ("second_1.pt", 20)] == [
        (found.name, found.step) for found in found_in(tmp_path, steps=given).found
    ]
    assert 2 == len(found_in(tmp_path, steps=dict.fromkeys(given, 10)).refused)


def test_a_best_file_is_no_half_and_a_last_file_is_a_copy(tmp_path: Path) -> None:
    """Many programs write both beside the checkpoint of a step."""
    for name in ("step_3.pt", "best.pt", "last.pt"):
        save(tmp_path / name, {"model": WEIGHTS, "step": 3})
    adoption = found_in(tmp_path)
    assert ["best.pt", "step_3.pt"] == [item.name for item in adoption.found]
    assert "a copy that is called last" in adoption.beside["last.pt"]


def test_a_signed_directory_is_not_adopted_into_without_its_key(tmp_path: Path) -> None:
    """By the library as by the command."""
    train(tmp_path, 0.5, trust=HMACKey(b"0123456789abcdef"))
    save(tmp_path / "step_7.pt")
    before = snapshot(tmp_path)
    storage = open_storage(tmp_path, "me")
    catalog = look_at(storage)
    with pytest.raises(UntrustedError, match="are signed"):
        list(adopt(catalog, find_foreign(catalog), Journal(storage, "me")))
    assert before == snapshot(tmp_path)
    shutil.rmtree(tmp_path)


COUNTERS: list[Any] = [-1, 2**63, 10**400, 1.5, float("nan"), float("inf"), float("-inf"), "5", None, True, [5]]


@pytest.mark.parametrize("value", COUNTERS, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("where", ["global_step", "epoch"])
def test_counters_that_no_record_has_are_named_and_left(tmp_path: Path, value: Any, where: str) -> None:
    """In what Lightning and the HF Trainer wrote; the file beside them is adopted."""
    state = {"global_step": 5, "epoch": 1, "pytorch-lightning_version": "2.6", "state_dict": {"w": tensor()}}
    (tmp_path / "odd.ckpt").write_bytes(torch_file(state | {where: value}))
    trainer = {"global_step": 5, "epoch": 1.0, "log_history": [{"step": 5, "loss": 10**400}]}
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5/trainer_state.json").write_text(json.dumps(trainer | {where: value}))
    save(tmp_path / "good.pt", WEIGHTS | {"step": 400})
    adoption = found_in(tmp_path)
    is_fraction = where == "epoch" and value in (1.5, None)  # The Trainer counts parts of epochs.
    assert {"good.pt"} | ({"checkpoint-5"} if is_fraction else set()) == {item.name for item in adoption.found}
    assert f"its {where} is " in adoption.refused["odd.ckpt"]
    assert is_fraction or f"its {where} is " in adoption.refused["checkpoint-5"]


def test_a_step_that_no_record_has_is_refused_by_name(tmp_path: Path) -> None:
    """A record with it could not be read again."""
    save(tmp_path / "a.pt")
    save(tmp_path / "step=99999999999999999999.pt")
    adoption = find_foreign(look_at(open_storage(tmp_path, "")), {"a.pt": 1 << 63})
    assert () == adoption.found
    assert "could not be read again" in adoption.refused["a.pt"]
    assert "neither the file nor its name has a step" in adoption.refused["step=99999999999999999999.pt"]


def test_a_payload_that_cannot_be_read_does_not_stop_the_others(tmp_path: Path) -> None:
    """It was there when the directory was looked at, and is gone now."""
    for step in (1, 2, 3):
        save(tmp_path / f"step={step}.pt")
    catalog = look_at(open_storage(tmp_path, ""))
    adoption = find_foreign(catalog)
    (tmp_path / "step=2.pt").unlink()
    bad: dict[str, Exception] = {}
    made = adopt(catalog, adoption, Journal(open_storage(tmp_path, ""), "me"), on_bad=bad.__setitem__)
    assert [1, 3] == [record.step for record in made]
    assert ["step=2.pt"] == [*bad]
