"""A training on a host that is stopped, another host takes its run over: by a `Loop`, the HF Trainer and Lightning."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpointer_transformers import last_valid_checkpoint
from support.hosts import Training, Trainings, two_hosts

from checkpointer import CheckpointManager
from checkpointer.restore.load import verify

pytestmark = pytest.mark.slow

STEPS = 12
GATE = 9
"""The step before which the first training is stopped."""


@pytest.fixture(scope="module")
def booted() -> Iterator[tuple[Trainings, Trainings]]:
    with two_hosts("support.taken_over_me") as both:
        yield both


@pytest.fixture
def hosts(booted: tuple[Trainings, Trainings]) -> Iterator[tuple[Trainings, Trainings]]:
    """Yield the two hosts, and kill what a failed test has left there."""
    yield booted
    for trainings in booted:
        trainings.clear()


WAYS = [(way, ranks) for way in ("loop", "transformers", "lightning") for ranks in (1, 2)]
IN_PLACE = ("transformers, not attached", 2)


@pytest.mark.parametrize(("way", "ranks"), [*WAYS, IN_PLACE])
def test_a_training_that_was_taken_over_ends_with_an_error_that_names_the_other(
    hosts: tuple[Trainings, Trainings], tmp_path: Path, way: str, ranks: int
) -> None:
    """All its ranks end, no rescue is written, and the run ends as one that nothing disturbed."""
    alpha, beta = hosts
    training: dict[str, Any] = {"way": way, "ranks": ranks}
    alone = beta.start(tmp_path / "alone.log", directory=str(tmp_path / "alone"), **training)
    assert 0 == alone.wait(), alone.errors
    directory = tmp_path / "run"
    first = alpha.start(tmp_path / "first.log", directory=str(directory), gate=GATE, **training)
    assert ["waits"] == first.read_until("waits"), first.errors
    first.stop()
    # By the environment, or by the lease.
    training["takeover"] = (way, ranks) == IN_PLACE
    second = beta.start(tmp_path / "second.log", directory=str(directory), gate=GATE + 2, **training)
    assert ["waits"] == second.read_until("waits"), second.errors
    first.go_on()
    first.open_gate()
    assert 1 == first.wait(), first.errors
    assert "FencedError" in first.errors
    assert "on host beta" in first.errors
    assert ranks == 1 or all(code != 0 for code in first.steps("codes"))
    second.open_gate()
    assert 0 == second.wait(), second.errors
    assert 0 < second.steps("begins")[0] < GATE
    assert result(alone) == result(second)
    manager = CheckpointManager(directory)
    assert manager.last is not None
    assert STEPS == manager.last.step
    assert ["regular"] * len(manager.records) == [record.kind for record in manager.records]


OPERATIONS = {
    "before it announces the checkpoint": ".checkpointer/transformers/*.json",
    "before the Trainer writes it": "checkpoint-8",
    "before its record": "checkpoint-8/trainer_state.json.new",
}


@pytest.mark.parametrize(("at", "ranks"), [*((at, 1) for at in OPERATIONS), ("before the Trainer writes it", 2)])
def test_a_trainer_that_is_stopped_in_its_own_save_harms_nothing(
    hosts: tuple[Trainings, Trainings], tmp_path: Path, at: str, ranks: int
) -> None:
    """The Trainer writes checkpoint-8 in place, and ends that late. No other training relies on it."""
    alpha, beta = hosts
    directory = tmp_path / "run"
    training: dict[str, Any] = {"way": "transformers, not attached", "ranks": ranks, "directory": str(directory)}
    alone = beta.start(tmp_path / "alone.log", **{**training, "directory": str(tmp_path / "alone")})
    assert 0 == alone.wait(), alone.errors
    first = alpha.start(tmp_path / "first.log", stop_at=OPERATIONS[at], **training)
    assert first.await_stop(), first.errors
    second = beta.start(tmp_path / "second.log", gate=8, **training)
    assert ["waits"] == second.read_until("waits"), second.errors
    first.go_on()
    assert 1 == first.wait(), first.errors
    assert "FencedError" in first.errors
    second.kill()
    third = beta.start(tmp_path / "third.log", gate=11, **training)
    assert ["waits"] == third.read_until("waits"), third.errors
    third.open_gate()
    assert 0 == third.wait(), third.errors
    assert [[6] * ranks] * 2 == [second.steps("begins"), third.steps("begins")]
    assert result(alone) == result(third)
    assert str(directory / "checkpoint-12") == last_valid_checkpoint(directory)
    for record in (manager := CheckpointManager(directory)).records:
        verify(manager.session._directory.storage, record)
    assert [10, 12] == [record.step for record in manager.records]


def result(training: Training) -> list[str]:
    """Return the last step of a training and the digest of its weights."""
    [line] = [line for line in training.said if line[0] == "result"]
    return line
