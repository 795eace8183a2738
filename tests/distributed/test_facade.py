"""A `DistributedManager` offers what a `CheckpointManager` offers, on every rank."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from support.together import together

from checkpointer import CheckpointManager, DistributedManager, EverySteps, KeepBest, KeepLast, Policy
from checkpointer.errors import NotFoundError

NAMES = [
    "observe",
    "restore",
    "rescue",
    "pin",
    "unpin",
    "wait",
    "close",
    "policy",
    "records",
    "best",
    "last",
    "to_yaml",
    "location",
]
POLICY = Policy(EverySteps(1), [KeepBest(2, "loss", mode="min"), KeepLast(1)], last="link")
LOSSES = {1: 0.5, 2: 0.25, 3: 0.75, 4: 1.0}


def shape(manager: type, name: str) -> Any:
    """Return the parameters of a method: names, kinds and defaults; "property" for a property."""
    member = inspect.getattr_static(manager, name)
    if isinstance(member, property):
        return "property"
    return [(part.name, part.kind, part.default) for part in inspect.signature(member).parameters.values()]


@pytest.mark.parametrize("name", NAMES)
def test_both_managers_are_called_alike(name: str) -> None:
    """So a training changes only the class when it gets more processes."""
    assert shape(CheckpointManager, name) == shape(DistributedManager, name)


def test_no_public_name_is_left_out() -> None:
    """``session`` is for hosts, which drive rank 0's manager."""
    assert sorted(NAMES) == [name for name in dir(CheckpointManager) if not name.startswith("_")]
    assert sorted(NAMES) == [name for name in dir(DistributedManager) if not name.startswith("_")]


def train(rank: int, directory: Path) -> Any:
    state = {"w": torch.zeros(2)}
    shown: list[Any] = []
    with DistributedManager(directory, POLICY if rank == 0 else None, state=lambda: state) as manager:
        for step, loss in LOSSES.items():
            state["w"].fill_(step)
            manager.observe({"loss": loss}, step, 0, epoch_end=False)
            if step == 3:
                manager.pin("epoch=0-step=3.ckpt")
            shown.append([(record.step, record.pinned) for record in manager.records])
        manager.observe({"loss": 0.125}, 4, 0, epoch_end=False)  # Ranks it after all.
        manager.unpin("epoch=0-step=3.ckpt")
        manager.observe({"loss": 2.0}, 5, 0, epoch_end=False)
        shown.append([(record.step, record.pinned) for record in manager.records])
        with pytest.raises(NotFoundError, match="the run has no checkpoint 'other'"):
            manager.pin("other")
        assert manager.best is not None
        place = manager.best.name, manager.location(manager.best.name)
        return shown, place, manager.to_yaml(), manager.policy.name.last_file


@pytest.mark.slow
def test_every_rank_shows_the_records_of_rank_0_and_pins_and_lists_with_it(tmp_path: Path) -> None:
    """Each method is a collective; what a rank shows is what was so after the last one."""
    first, second = together(2, train, tmp_path)

    assert first == second
    shown, (best, location), scores, last = first
    assert [(1, False)] == shown[0]
    assert [(1, False), (2, False), (3, True)] == shown[2]
    assert [(1, False), (2, False), (3, True), (4, False)] == shown[3]
    assert [(2, False), (4, False), (5, False)] == shown[4]
    assert ("epoch=0-step=4.ckpt", str(tmp_path / best), "last.ckpt") == (best, location, last)
    assert {location: 0.125, str(tmp_path / "epoch=0-step=2.ckpt"): 0.25} == scores
    assert (tmp_path / "best_k_models.yaml").exists()


def restore(rank: int, directory: Path) -> Any:
    state = {"w": torch.ones(2)}
    with DistributedManager(directory, POLICY, state=lambda: state) as manager:
        assert not manager.rescue("nothing was done yet")
        assert manager.rescue("asked for", step=2, epoch=0)
        restored = manager.restore(verify="size", mmap=True)
        assert restored is not None
        return restored.step, restored.state["w"].tolist(), [record.kind for record in manager.records]


@pytest.mark.slow
def test_every_rank_rescues_a_step_that_is_passed_and_maps_the_file(tmp_path: Path) -> None:
    """As a single process does."""
    assert [(2, [1.0, 1.0], ["rescue"])] * 2 == together(2, restore, tmp_path)
