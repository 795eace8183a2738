"""A Loop goes on from what another program wrote, once it was adopted."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointer_torch import Loop, load_weights
from safetensors.torch import save_file
from support.commands import command
from torch import nn

from checkpointer import CheckpointerWarning, CheckpointManager, EverySteps, KeepBest, KeepLast, Policy
from checkpointer.errors import MismatchError, NotFoundError, RestoreError

POLICY = Policy(EverySteps(1), [KeepLast(2)])


def filled() -> nn.Linear:
    """A model whose weights are all 2."""
    model = nn.Linear(2, 1)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 2.0)
    return model


def bare(folder: Path) -> None:
    """What people write by hand."""
    torch.save({"model": filled().state_dict(), "optimizer": {"state": {}}, "epoch": 3, "step": 40}, folder / "old.pt")


def weights(folder: Path) -> None:
    """Weights alone."""
    torch.save(filled().state_dict(), folder / "epoch=3-step=40.pt")


def hugging_face(folder: Path) -> None:
    """A folder of the Trainer."""
    (folder / "checkpoint-40").mkdir()
    save_file(filled().state_dict(), folder / "checkpoint-40" / "model.safetensors")
    torch.save({}, folder / "checkpoint-40" / "optimizer.pt")
    (folder / "checkpoint-40" / "trainer_state.json").write_text(json.dumps({"global_step": 40, "epoch": 4.0}))


@pytest.mark.parametrize("write", [bare, weights, hugging_face])
def test_a_loop_goes_on_from_what_was_adopted(tmp_path: Path, write: Any) -> None:
    """At every start until it has saved; then from its own checkpoint, without a warning."""
    write(tmp_path)
    assert 0 == command("adopt", tmp_path).code
    for _ in range(2):
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with (
            Loop(tmp_path, POLICY, model=model, optimizer=optimizer) as loop,
            pytest.warns(CheckpointerWarning, match=r"was adopted, .* step 40 of its record.* anew.*: optimizer"),
        ):
            progress = loop.resume()
        assert (40, 4, [[2.0, 2.0]]) == (progress.step, progress.epoch, model.weight.tolist())
    with Loop(tmp_path, POLICY, model=model, optimizer=optimizer) as loop:
        with pytest.warns(CheckpointerWarning, match="was adopted"):
            loop.resume()
        for _ in loop.epochs(5):
            for _ in loop.batches([1]):
                loop.step()
    with Loop(tmp_path, POLICY, model=model, optimizer=optimizer) as loop:
        assert 41 == loop.resume().step


def test_weights_of_another_model_are_still_refused(tmp_path: Path) -> None:
    """A training that goes on from none of them is a mistake. It changes neither the directory nor the model."""
    bare(tmp_path)
    assert 0 == command("adopt", tmp_path).code
    model = nn.Conv2d(1, 1, 1)
    weight = model.weight.tolist()
    with (
        Loop(tmp_path, POLICY, model=model) as loop,
        pytest.raises(
            MismatchError, match=r"does not fit.*resume\('.*/old.pt', map=\{'model': KEY\}\); step and epoch"
        ),
    ):
        loop.resume()
    assert weight == model.weight.tolist()
    assert not (tmp_path / ".checkpointer" / "terms").exists()


def test_no_module_changes_if_another_does_not_fit(tmp_path: Path) -> None:
    """What is loaded is loaded as a whole."""
    torch.save({"one": filled().state_dict(), "two": nn.Linear(5, 5).state_dict(), "step": 4}, tmp_path / "old.pt")
    assert 0 == command("adopt", tmp_path).code
    one = nn.Linear(2, 1)
    weight = one.weight.tolist()
    with Loop(tmp_path, POLICY, one=one, two=nn.Linear(3, 3)) as loop, pytest.raises(MismatchError, match="two"):
        loop.resume()
    assert weight == one.weight.tolist()


BEST = Policy(EverySteps(1), [KeepBest(2, "loss", mode="min")])


@pytest.mark.parametrize("which", [None, "last", "best", 20, "old_20.pt", "old_20", "path"])
def test_each_way_to_name_an_adopted_checkpoint_loads_its_weights(tmp_path: Path, which: Any) -> None:
    """As the plain resume does: from its directory, and from another one."""
    for step, loss in ((10, 0.5), (20, 0.1)):
        state = {"model": filled().state_dict(), "optimizer": {"state": {}}, "step": step, "loss": loss}
        torch.save(state, tmp_path / f"old_{step}.pt")
    assert 0 == command("adopt", tmp_path).code
    which = tmp_path / "old_20.pt" if which == "path" else which
    model = nn.Linear(2, 1)
    with Loop(tmp_path, BEST, model=model) as loop, pytest.warns(CheckpointerWarning, match="old_20.pt was adopted"):
        assert 20 == loop.resume(which).step
    assert [[2.0, 2.0]] == model.weight.tolist()


@pytest.mark.parametrize("of_directory", [False, True])
def test_a_new_directory_starts_from_an_adopted_checkpoint_elsewhere(tmp_path: Path, of_directory: bool) -> None:
    """Step and epoch are those of its record, with a map too if that does not say them."""
    (tmp_path / "old").mkdir()
    bare(tmp_path / "old")
    assert 0 == command("adopt", tmp_path / "old").code
    place = tmp_path / "old" if of_directory else tmp_path / "old" / "old.pt"
    for number, names in enumerate(({}, {"model": "model"})):
        model = nn.Linear(2, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CheckpointerWarning)
            with Loop(tmp_path / f"new{number}", POLICY, model=model) as loop:
                progress = loop.resume(place, map=names)
        assert (40, 4, [[2.0, 2.0]]) == (progress.step, progress.epoch, model.weight.tolist())


def test_a_map_names_the_files_of_a_folder_and_the_items_of_a_list(tmp_path: Path) -> None:
    """What the Trainer wrote as files is loaded as they are: weights, optimizer, counts."""
    model, names = nn.Linear(2, 1), {"model": "model.safetensors"}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    hugging_face(tmp_path)
    torch.save({"states": [{}, optimizer.state_dict()]}, tmp_path / "checkpoint-40" / "optimizer.pt")
    names |= {"optimizer": "optimizer.pt.states.1", "step": "trainer_state.json.global_step"}
    with Loop(tmp_path / "new", POLICY, model=model, optimizer=optimizer) as loop:
        assert 40 == loop.resume(tmp_path / "checkpoint-40", map=names).step
        assert [[2.0, 2.0]] == model.weight.tolist()
        with pytest.raises(MismatchError, match=r"no '2' \(have: a list, whose items are '0' to '1'\)"):
            loop.resume(tmp_path / "checkpoint-40", map={**names, "optimizer": "optimizer.pt.states.2"})
        with pytest.raises(MismatchError, match=r"no 'optim' \(have: model.safetensors, optimizer.pt, trainer_state"):
            loop.resume(tmp_path / "checkpoint-40", map={**names, "optimizer": "optim"})


def test_a_training_removes_no_adopted_checkpoint_and_prune_does(tmp_path: Path) -> None:
    """Its rules count them, but another program wrote them: only a command that is asked to removes them."""
    for step in (10, 20, 30):
        torch.save({"model": filled().state_dict(), "step": step}, tmp_path / f"old_{step}.pt")
    assert 0 == command("adopt", tmp_path).code
    with Loop(tmp_path, POLICY, model=nn.Linear(2, 1)) as loop:
        with pytest.warns(CheckpointerWarning, match="was adopted"):
            loop.resume()
        for _ in loop.epochs(2):
            for _ in loop.batches(range(4)):
                loop.step()
    assert ["old_10.pt", "old_20.pt", "old_30.pt"] == sorted(path.name for path in tmp_path.glob("old_*.pt"))
    assert 2 == len(list(tmp_path.glob("epoch*.ckpt")))
    assert 0 == command("prune", tmp_path, "--apply").code
    assert [] == list(tmp_path.glob("old_*.pt"))


def trained(folder: Path, steps: int, which: Any = None, **options: Any) -> int:
    """Take some steps in a directory; returns the step that they went on from."""
    with Loop(folder, POLICY, model=nn.Linear(2, 1)) as loop, warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointerWarning)  # What was adopted says so.
        start = loop.resume(which, **options).step
        for _ in loop.steps(start + steps):
            loop.step()
    return start


@pytest.mark.parametrize("with_run", [False, True])
def test_a_run_goes_on_from_its_own_checkpoint_whatever_is_adopted_beside_it(tmp_path: Path, with_run: bool) -> None:
    """It may be a run of its own or a part of the run, and of a later step; its name still reaches it."""
    assert 0 == trained(tmp_path, 5)
    for step in (1, 7):
        torch.save({"model": filled().state_dict(), "step": step, "loss": step}, tmp_path / f"old_{step}.pt")
    run = ("--run", CheckpointManager(tmp_path).last.run) if with_run else ()  # type: ignore[union-attr]
    said = command("adopt", tmp_path, *run)
    assert "a training here still goes on from epoch=0-step=5.ckpt of run" in said.err
    assert "old_1.pt" in command("ls", tmp_path).out
    assert 5 == CheckpointManager(tmp_path).last.step  # type: ignore[union-attr]
    assert 5 == trained(tmp_path, 3)  # It saves step 7 although an adopted checkpoint has that step.
    assert {"epoch=0-step=7.ckpt", "epoch=0-step=8.ckpt"} == {path.name for path in tmp_path.glob("epoch*.ckpt")}
    assert 8 == trained(tmp_path, 0)
    assert 7 == trained(tmp_path, 0, "old_7.pt")


def test_a_run_that_began_with_a_file_goes_on_from_its_own_checkpoint(tmp_path: Path) -> None:
    """The file is adopted later, and the program still names it at each start."""
    torch.save({"model": filled().state_dict(), "step": 10}, tmp_path / "old_10.pt")
    names = {"model": "model", "step": "step"}
    assert 10 == trained(tmp_path, 2, tmp_path / "old_10.pt", map=names)
    assert 0 == command("adopt", tmp_path).code
    assert 12 == trained(tmp_path, 1, tmp_path / "old_10.pt", map=names)
    assert 13 == trained(tmp_path, 1)


def test_what_is_adopted_later_joins_the_run_of_its_folder(tmp_path: Path) -> None:
    """The other program went on meanwhile: its newest checkpoint is the newest, and all are ranked together."""
    for step in (10, 20):
        torch.save({"model": filled().state_dict(), "step": step, "loss": 1 / step}, tmp_path / f"old_{step}.pt")
        assert 0 == command("adopt", tmp_path).code
    assert 20 == trained(tmp_path, 0)
    assert 1 == len({record["run"] for record in command("ls", tmp_path, "--json").data})


def test_the_run_that_was_chosen_among_several_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two callbacks of one training wrote two folders. The log and the errors say how to take the other run."""
    for folder, step, scores in (("best", 10, {"loss": 0.5}), ("every", 20, {})):
        (tmp_path / folder).mkdir()
        torch.save({"model": filled().state_dict(), "step": step, **scores}, tmp_path / folder / f"old_{step}.pt")
    assert 0 == command("adopt", tmp_path).code
    other = next(one["run"] for one in command("ls", tmp_path, "--json").data if one["step"] == 10)
    model = nn.Linear(2, 1)
    assert load_weights(model, tmp_path).source.endswith("every/old_20.pt")
    assert "taken is every/old_20.pt of the newest run" in caplog.text
    assert f"The other runs: {other} (newest best/old_10.pt, step 10)" in caplog.text
    with pytest.raises(NotFoundError, match=rf"has loss; run {other} has best/old_10.pt: pass run='{other}', or this"):
        load_weights(model, tmp_path, "best", policy=BEST)
    assert load_weights(model, tmp_path, "best", policy=BEST, run=other).source.endswith("best/old_10.pt")
    with pytest.raises(NotFoundError, match=f"no checkpoint at step 10; run {other} has best/old_10.pt"):
        CheckpointManager(tmp_path).restore(10)
    with (
        Loop(tmp_path, BEST, options={"run": other}, model=model) as loop,
        pytest.warns(CheckpointerWarning, match="old_10.pt was adopted"),
    ):
        assert 10 == loop.resume("best").step


def test_a_step_that_two_runs_have_is_refused_until_one_is_chosen(tmp_path: Path) -> None:
    """As the commands do: both checkpoints are named, and nothing is loaded. A name or the run says which is meant."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        torch.save({"model": filled().state_dict(), "step": 10}, tmp_path / folder / "old_10.pt")
    assert 0 == command("adopt", tmp_path).code
    runs = {one["name"]: one["run"] for one in command("ls", tmp_path, "--json").data}
    model = nn.Linear(2, 1)
    weight = model.weight.tolist()
    said = (
        rf"has 2 checkpoints of step 10: .*{runs['a/old_10.pt']}.*{runs['b/old_10.pt']}.*name one of them, or pass run="
    )
    for take in (
        lambda: load_weights(model, tmp_path, 10),
        lambda: CheckpointManager(tmp_path).restore(10),
        lambda: trained(tmp_path, 0, 10),
    ):
        with pytest.raises(NotFoundError, match=said):
            take()
    assert weight == model.weight.tolist()
    assert load_weights(model, tmp_path, 10, run=runs["a/old_10.pt"]).source.endswith("a/old_10.pt")
    assert load_weights(model, tmp_path, "b/old_10.pt").source.endswith("b/old_10.pt")
    assert 10 == trained(tmp_path, 0, "a/old_10.pt")


def test_without_a_ranking_best_says_what_can_be_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither a Loop nor `load_weights` guesses a metric. A call that only reads logs no plan of saves."""
    for step in (10, 20):
        torch.save({"model": filled().state_dict(), "step": step, "loss": 1 / step}, tmp_path / f"old_{step}.pt")
    assert 0 == command("adopt", tmp_path).code
    caplog.set_level(logging.INFO, "checkpointer")
    said = r"no policy with a KeepBest.*Name a checkpoint or its step.*ls DIRECTORY --sort METRIC.*have loss"
    with pytest.raises(RestoreError, match=said):
        load_weights(nn.Linear(2, 1), tmp_path, "best")
    assert load_weights(nn.Linear(2, 1), tmp_path, "old_20.pt").loaded
    assert "save never" not in caplog.text
    with pytest.raises(RestoreError, match=said):
        trained(tmp_path, 0, "best")
