"""A signal to the whole process group, from another process: what SLURM, Kubernetes, torchrun and a terminal send."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from struck import Kind, strike

from checkpointer import CheckpointManager

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a training that nothing interrupts ends with."""
    return strike(tmp_path_factory.mktemp("unbroken"), Kind(where=""), None)[1]


@pytest.mark.parametrize(
    ("kind", "saved", "is_exact"),
    [
        (Kind(where="within"), "rescue-step=5.ckpt", True),
        (Kind(where="after", persistent=True), "rescue-step=5.ckpt", False),
        (Kind(where="after", start="spawn"), "rescue-step=5.ckpt", False),
        (Kind(where="save"), "epoch=0-step=5.ckpt", True),
        (Kind(where="validation", step=7, watched=True), "rescue-step=7.ckpt", True),
        (Kind(where="validation", step=7), "rescue-step=7.ckpt", False),
    ],
    ids=["step", "persistent", "spawned", "save", "watched", "validation"],
)
def test_a_sigterm_to_the_group_saves_once_and_ends_the_training_by_itself(
    tmp_path: Path, unbroken: str, kind: Kind, saved: str, is_exact: bool
) -> None:
    """Whether its workers die of it or not. A resume is exact, but for a validation that drew random numbers."""
    assert (-signal.SIGTERM, "") == strike(tmp_path, kind)
    assert [saved] == [record.name for record in CheckpointManager(tmp_path).records]
    if is_exact:
        assert (0, unbroken) == strike(tmp_path, kind, None)


@pytest.mark.parametrize(("number", "start"), [(signal.SIGINT, "spawn"), (signal.SIGUSR1, "fork")])
def test_other_signals_to_the_group_do_the_same(tmp_path: Path, number: int, start: str) -> None:
    """Spawned workers have not inherited the handlers of their parent: by default both signals end them."""
    code = 1 if number == signal.SIGINT else -number
    assert (code, "") == strike(tmp_path, Kind(where="after", start=start), number)
    assert ["rescue-step=5.ckpt"] == [record.name for record in CheckpointManager(tmp_path).records]
