"""A Loop goes on from what another program wrote, once it was adopted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointer_torch import Loop
from safetensors.torch import save_file
from support.commands import command
from torch import nn

from checkpointer import CheckpointerWarning, EverySteps, KeepLast, Policy
from checkpointer.errors import MismatchError

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
            pytest.warns(CheckpointerWarning, match=r"was adopted, .* step 40 of its record.* anew: optimizer"),
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
    """A training that goes on from none of them is a mistake."""
    bare(tmp_path)
    assert 0 == command("adopt", tmp_path).code
    with Loop(tmp_path, POLICY, model=nn.Conv2d(1, 1, 1)) as loop, pytest.raises(MismatchError, match="does not fit"):
        loop.resume()


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


def test_adopting_beside_a_run_says_where_the_next_start_goes_on(tmp_path: Path) -> None:
    """It is the adopted checkpoint, whatever its step."""
    with Loop(tmp_path, POLICY, model=nn.Linear(2, 1)) as loop:
        for _ in loop.steps(2):
            loop.step()
    torch.save({"model": filled().state_dict(), "step": 1}, tmp_path / "old_1.pt")
    said = command("adopt", tmp_path)
    assert "a training here now goes on from old_1.pt, and not from epoch=0-step=2.ckpt of run" in said.err
