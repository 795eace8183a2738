"""Weights that are swapped for a validation: a checkpoint is ranked by a metric only if it has what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointer_torch import Loop, load_weights
from support.schedule_free import ScheduleFree
from torch import nn
from torch.optim.swa_utils import AveragedModel

from checkpointer import CheckpointerWarning, CheckpointManager, EveryEpochs, EverySteps, KeepBest, KeepLast, Policy

BEST = KeepBest(1, "val", mode="min")
STEPS = Policy(EverySteps(2), [BEST, KeepLast(1)])
EPOCHS = Policy(EveryEpochs(1), [BEST])


def make() -> tuple[nn.Module, ScheduleFree]:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    return model, ScheduleFree(model.parameters())


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, batch: int) -> None:
    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(batch))
    optimizer.zero_grad()
    (model(inputs) - 1.0).square().mean().backward()
    optimizer.step()


def validate(model: nn.Module) -> float:
    with torch.no_grad():
        return float((model(torch.linspace(-1, 1, 12).view(4, 3)) - 1.0).square().mean())


def measured(directory: Path, policy: Policy, part: str = "model") -> tuple[float, float]:
    """Return what the record of the best says, and what its weights give."""
    best = CheckpointManager(directory, policy).best
    assert best is not None
    model = nn.Linear(3, 1)
    load_weights(model, directory, best.name, part=part)
    return best.metrics["val"], validate(model)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("back_first", [False, True])
def test_a_checkpoint_saved_in_training_is_not_ranked_by_what_other_weights_gave(
    tmp_path: Path, back_first: bool, background: bool
) -> None:
    """Whether it is reported before or after the way back; the record says so, and a warning does, once."""

    def train() -> tuple[Loop, float]:
        model, optimizer = make()
        value, options = 0.0, {"background": "wait" if background else None}
        with Loop(tmp_path, STEPS, options=options, model=model, optimizer=optimizer) as loop:
            for _ in loop.epochs(1):
                for batch in loop.batches(range(6)):
                    optimizer.train()
                    learn(model, optimizer, batch)
                    loop.step({"train": 0.0})
                    if loop.progress.step % 2 == 0:
                        optimizer.eval()
                        value = validate(model)
                        if back_first:
                            optimizer.train()
                        loop.report({"val": value})
        return loop, value

    with pytest.warns(CheckpointerWarning, match=r"^val does not rank the checkpoint of step 2, ") as caught:
        loop, value = train()
    assert 1 == len(caught)
    assert loop.best is None
    assert {"train": 0.0, "val (other weights)": value} == dict(loop.manager.records[-1].metrics)


@pytest.mark.parametrize("where", ["epoch", "body"])
def test_a_checkpoint_saved_as_it_is_measured_is_ranked_and_has_those_weights(tmp_path: Path, where: str) -> None:
    """At the end of the epoch, or in the body where step() comes after the validation; resumed, it goes on exactly."""
    policy = EPOCHS if where == "epoch" else STEPS

    def train(directory: Path, epochs: int) -> Any:
        model, optimizer = make()
        with Loop(directory, policy, model=model, optimizer=optimizer) as loop:
            loop.resume()
            for _ in loop.epochs(epochs):
                for batch in loop.batches(range(4)):
                    optimizer.train()
                    learn(model, optimizer, batch)
                    metrics = {}
                    if where == "body" and batch % 2:
                        optimizer.eval()
                        metrics = {"val": validate(model)}
                    loop.step(metrics)
                if where == "epoch":
                    optimizer.eval()
                    loop.report({"val": validate(model)})
        return model.state_dict()

    train(tmp_path / "run", 1)
    resumed, unbroken = train(tmp_path / "run", 3), train(tmp_path / "unbroken", 3)
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)
    said, given = measured(tmp_path / "run", policy)
    assert said == given


@pytest.mark.filterwarnings("ignore:metric 'val' was not reported")
def test_a_way_back_before_the_epoch_ends_is_noticed(tmp_path: Path) -> None:
    """What the end of the epoch saves has the training weights again."""

    def train() -> Loop:
        model, optimizer = make()
        with Loop(tmp_path, Policy(EveryEpochs(1), [BEST, KeepLast(1)]), model=model, optimizer=optimizer) as loop:
            for _ in loop.epochs(1):
                optimizer.train()
                for batch in loop.batches(range(2)):
                    learn(model, optimizer, batch)
                    loop.step()
                optimizer.eval()
                loop.report({"val": validate(model)})
                optimizer.train()
        return loop

    with pytest.warns(CheckpointerWarning, match="which has the training weights of a schedule-free optimizer"):
        loop = train()
    assert loop.best is None


def test_an_average_beside_the_model_is_in_the_checkpoint_it_ranks(tmp_path: Path) -> None:
    """Saved first and ranked later, its part of the file has the weights that were measured."""
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = AveragedModel(model, avg_fn=lambda average, new, _: 0.9 * average + 0.1 * new)
    with Loop(tmp_path, STEPS, model=model, optimizer=optimizer, ema=ema) as loop:
        for _ in loop.epochs(1):
            for batch in loop.batches(range(6)):
                learn(model, optimizer, batch)
                ema.update_parameters(model)
                loop.step()
                if loop.progress.step % 2 == 0:
                    loop.report({"val": validate(ema)})
    said, given = measured(tmp_path, STEPS, part="ema")
    assert said == given
