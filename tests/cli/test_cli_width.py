"""Tables fit the terminal, whatever a trainer wrote; in a file or pipe no name is broken."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import command

from checkpointer import CheckpointManager, EverySteps, KeepBest, KeepLast, Policy

LIGHTNING = Path(__file__).parents[1] / "foreign" / "files" / "lightning"
TRAINER = {"eval_loss": 0.72, "eval_runtime": 0.09, "eval_samples_per_second": 658.4, "eval_steps_per_second": 82.3}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run as the HF Trainer reports it."""
    policy = Policy(
        EverySteps(1), [KeepBest(2, "eval_loss", mode="min"), KeepLast(1)], name="checkpoint-{step}", last="link"
    )
    with CheckpointManager(tmp_path / "run", policy, state=dict) as manager:
        manager.observe(TRAINER | {"loss": 0.69, "grad_norm": 0.4, "learning_rate": 1e-5}, step=40, epoch=4)
    return tmp_path / "run"


def widest(text: str) -> int:
    """Return the length of the longest line."""
    return max(map(len, text.splitlines()))


@pytest.mark.parametrize("columns", [80, 100])
def test_show_of_what_lightning_wrote_fits_the_terminal(columns: int) -> None:
    """Its keys hold the settings of its callbacks."""
    said = command("show", LIGHTNING / "last.ckpt", columns=columns)
    assert widest(said.out) <= columns
    assert "'every_n_train_steps'" in said.out.replace("\n", "")


@pytest.mark.parametrize("columns", [80, 100])
def test_ls_of_what_the_trainer_reported_fits_the_terminal(run: Path, columns: int) -> None:
    """Times and rates are not scores: they come last, and are left out first."""
    said = command("ls", run, columns=columns)
    place, head, *rows = said.out.splitlines()
    assert widest("\n".join([head, *rows])) <= columns
    assert ["step", "epoch", "eval_loss"] == head.split()[:3]
    assert "eval_samples_per_second" not in head
    assert place.startswith(str(run))
    assert any(line.strip() == "#1 of the best 2 by eval_loss (min); the" for line in rows)
    wide = command("ls", run, columns=200).out.splitlines()[1].split()
    assert ["eval_loss", "loss"] == wide[2:4]
    assert "eval_runtime" in wide
    assert "eval_runtime" in command("ls", run, "-m", "eval_runtime", columns=columns).out


def test_in_a_pipe_lines_are_short_and_names_are_whole(tmp_path: Path) -> None:
    """Scripts read names, and people read logs."""
    name = "a-long-name-of-a-run/" + "x" * 60
    policy = Policy(EverySteps(1), [KeepBest(2, "val_loss", mode="min"), KeepLast(1)], name=name[-60:] + "{step}")
    with CheckpointManager(tmp_path, policy, state=dict) as manager:
        manager.observe({"val_loss": 0.5} | {f"metric_number_{n}": n for n in range(20)}, step=1, epoch=0)
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    argv = [sys.executable, "-m", "checkpointer", "ls", str(tmp_path)]
    out = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True).stdout
    assert f"{'x' * 60}step=1.ckpt" in out
    assert widest(out.partition("\n")[2]) <= 120
