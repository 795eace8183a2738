"""Weights that are swapped for a validation: a plain manager ranks late metrics only by the weights that it saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.schedule_free import ScheduleFree
from torch import nn

from checkpointer import CheckpointerWarning, CheckpointManager, EveryEpochs, EverySteps, KeepBest, KeepLast, Policy

BEST = KeepBest(1, "val", mode="min")
POLICY = Policy(EverySteps(1), [BEST, KeepLast(1)])
MARK = "; with the training weights of a schedule-free optimizer"
pytestmark = pytest.mark.filterwarnings("ignore:metric 'val' was not reported")


def opened(directory: Path, optimizer: Any, policy: Policy = POLICY, **options: Any) -> CheckpointManager:
    """Return a manager of a state as people have it: the model's and the optimizer's."""
    return CheckpointManager(directory, policy, state=lambda: {"optimizer": optimizer.state_dict()}, **options)


def make() -> ScheduleFree:
    """Return an optimizer with its training weights in the model."""
    optimizer = ScheduleFree(nn.Linear(1, 1).parameters())
    optimizer.train()
    return optimizer


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("background", [None, "wait"])
def test_late_metrics_do_not_rank_a_checkpoint_with_training_weights(
    tmp_path: Path, background: Any, again: bool
) -> None:
    """Saved first, validated after `eval()`: the record has them under another name, also in a new process."""
    optimizer = make()
    manager = opened(tmp_path, optimizer, background=background)
    manager.observe({"loss": 0.5}, step=1, epoch=0)
    if again:
        manager.close()
        manager = opened(tmp_path, optimizer, background=background)
        manager.restore()
    optimizer.eval()
    with pytest.warns(CheckpointerWarning, match=r"^val does not rank the checkpoint of step 1, .*'Averaged weights'"):
        manager.observe({"loss": 0.5, "val": 0.1}, step=1, epoch=0)
    manager.close()
    assert manager.best is None
    (record,) = manager.records
    assert {"loss": 0.5, "val (other weights)": 0.1} == dict(record.metrics)
    assert record.reason.endswith(MARK)


def test_a_save_that_ranks_training_weights_says_so_once(tmp_path: Path) -> None:
    """The manager cannot know what was measured before: it ranks, the record says what it has, and a warning does."""
    with opened(tmp_path, make()) as manager:
        with pytest.warns(CheckpointerWarning, match=r"^step 1 is ranked by val, .* If val was measured after") as said:
            manager.observe({"val": 0.1}, step=1, epoch=0)
        assert 1 == len(said)
        manager.observe({"val": 0.2}, step=2, epoch=0)
        assert all(record.reason.endswith(MARK) for record in manager.records)
        assert manager.best is not None
        assert 1 == manager.best.step


@pytest.mark.parametrize("way", ["eval", "unranked", "other optimizer"])
def test_there_is_no_false_alarm(tmp_path: Path, way: str) -> None:
    """Not for what is saved as it is measured, for a metric that no rule ranks by, or for another optimizer."""
    optimizer: Any = torch.optim.SGD(nn.Linear(1, 1).parameters()) if way == "other optimizer" else make()
    if way == "eval":
        optimizer.eval()
    with opened(tmp_path, optimizer, Policy(EveryEpochs(1), [BEST, KeepLast(2)])) as manager:
        manager.observe({"loss" if way == "unranked" else "val": 0.1}, step=1, epoch=0)
    assert [way == "unranked"] == [record.reason.endswith(MARK) for record in manager.records]


@pytest.mark.parametrize("state", [{"a": {"param_groups": [{"train_mode": True}]}}, {"opts": [{"param_groups": [{}]}]}])
def test_a_state_is_looked_into_as_deep_as_trainers_nest_optimizers(tmp_path: Path, state: Any) -> None:
    """A mode in a dict of optimizers counts, and groups without modes do not."""
    with CheckpointManager(tmp_path, Policy(EverySteps(1), [KeepLast(1)]), state=lambda: state) as manager:
        manager.observe({}, step=1, epoch=0)
    assert ("a" in state) == manager.records[0].reason.endswith(MARK)
