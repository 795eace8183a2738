"""The benchmarks run, also where the devices and peers that they are meant for are missing. No test looks at a time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def _run(where: Path, script: str, *arguments: str) -> str:
    # The worker threads of OpenMP would wait for each other on busy cores.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    run = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True)
    assert 0 == run.returncode, run.stdout + run.stderr
    return run.stdout


def test_the_command_for_a_gpu_runs_dry_on_the_cpu(tmp_path: Path) -> None:
    """All its sections, with the checks that each bit comes back."""
    said = _run(tmp_path, "on_gpu.py", "--device", "cpu", "--megabytes", "8", "--repeats", "1")

    assert "| resume in a new process, deterministic algorithms | torch-checkpointer | each bit is equal |" in said
    assert "| FSDP2 on one rank, gloo | torch-checkpointer | each bit is equal |" in said
    assert "tests collected" in said
    assert "| the device's next step begins after |" in said
    assert "|  | torch-checkpointer, verified |" in said
    assert "all sections are through" in said
    assert [] == list(tmp_path.iterdir())


def test_the_long_table_has_a_row_for_each_side_and_names_what_is_missing(tmp_path: Path) -> None:
    """A peer that cannot run a row says why there."""
    said = _run(tmp_path, "performance.py", "--only", "durable", "--megabytes", "1", "--repeats", "1")

    assert "| blocking save to durable | write + fsync |" in said
    assert "|  | torch-checkpointer |" in said
    assert "|  | DCP + fsync |" in said or "not installed: DCP: " in said  # torch 2.7 has an older one.
    is_missing = find_spec("torch_checkpointing") is None
    assert is_missing == ("not installed: torch-checkpointing: No module named 'torch_checkpointing'" in said)
    assert [] == list(tmp_path.iterdir())


@pytest.mark.skipif(not (BENCHMARKS.parent / ".git").exists(), reason="the other commit comes from git")
def test_each_measure_of_another_commit_has_a_row_with_ratios(tmp_path: Path) -> None:
    """The other commit is the newest one here; its checkout and the checkpoints are gone afterwards."""
    rounds = ["--only", "loop", "save", "--rounds", "0.001"]
    said = _run(tmp_path, "against.py", "HEAD", *rounds, "--folder", str(tmp_path))

    numbers = r" \| \d+\.\d{3}" * 6
    for what in ("a step of a Loop, not due", "a save of 1 byte", "the same, CPU"):
        assert re.search(rf"\| {what} \(\w+\){numbers} \|", said), said
    assert [] == list(tmp_path.iterdir())
