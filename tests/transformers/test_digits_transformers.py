"""The digits with the Trainer, killed as it saves: it ends with the weights of a run that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples/digits_transformers.py"
PATIENCE_S = 300.0
"""A run that takes this long (seconds) hangs."""


def start(directory: Path) -> subprocess.Popen[str]:
    """Start the example in a process of its own."""
    command = [sys.executable, str(EXAMPLE), "--directory", str(directory), "--epochs", "3"]
    environment = {**os.environ, "PYTHONPATH": ":".join(path for path in sys.path if path)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> list[str]:
    """Let the example come to its end, and return the lines it prints."""
    out, err = process.communicate(timeout=PATIENCE_S)
    assert 0 == process.returncode, err
    return out.splitlines()


def test_a_killed_run_ends_with_the_weights_of_an_unbroken_one(tmp_path: Path) -> None:
    """And with the same checkpoints, of the same run: killed as soon as the first one shows."""
    unbroken = start(tmp_path / "unbroken")
    killed = start(tmp_path / "killed")
    give_up = time.monotonic() + PATIENCE_S
    while not list((tmp_path / "killed").glob("checkpoint-*")):
        assert killed.poll() is None, "it came to its end before it could be killed"
        assert time.monotonic() < give_up, "it does not save"
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=PATIENCE_S)
    resumed = finish(start(tmp_path / "killed"))
    expected = finish(unbroken)
    assert resumed[0].startswith("resumed from checkpoint-")
    assert expected[-1].startswith("weights xxh3-128 ")
    assert expected[-2:] == resumed[-2:]
    kept = [sorted(path.name for path in (tmp_path / run).glob("*-*")) for run in ("unbroken", "killed")]
    assert kept[0] == kept[1]
