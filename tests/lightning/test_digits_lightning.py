"""The digits with Lightning, killed between and within epochs: it ends with the weights of a run that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.sampling import some

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples/digits_lightning.py"
PATIENCE_S = 300.0
"""A run that takes this long (seconds) hangs."""


def start(directory: Path) -> subprocess.Popen[str]:
    """Start the example in a process of its own."""
    command = [sys.executable, str(EXAMPLE), "--directory", str(directory), "--epochs", "5"]
    environment = {**os.environ, "PYTHONPATH": ":".join(path for path in sys.path if path)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> list[str]:
    """Let the example come to its end, and return the lines it prints."""
    out, err = process.communicate(timeout=PATIENCE_S)
    assert 0 == process.returncode, err
    return out.splitlines()


def kill_after(directory: Path, saves: int) -> None:
    """Kill a run as soon as its directory shows so many saves."""
    process = start(directory)
    give_up = time.monotonic() + PATIENCE_S
    seen = {path.name for path in directory.glob("epoch=*.ckpt")}
    new: set[str] = set()
    while len(new) < saves:
        assert process.poll() is None, "it came to its end before it could be killed"
        assert time.monotonic() < give_up, "it does not save"
        new |= {path.name for path in directory.glob("epoch=*.ckpt")} - seen
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=PATIENCE_S)


def test_a_killed_run_ends_with_the_weights_of_an_unbroken_one(tmp_path: Path) -> None:
    """And with the same checkpoints, of the same run."""
    beside = start(tmp_path / "unbroken")
    for saves in (1, 2)[: some(6)]:
        kill_after(tmp_path / "killed", saves)
    lines = finish(start(tmp_path / "killed"))
    unbroken = finish(beside)
    assert lines[0].startswith("resumed from epoch=")
    assert unbroken[-1].startswith("weights xxh3-128 ")
    assert unbroken[-1] == lines[-1]
    kept = [sorted(path.name for path in (tmp_path / run).glob("*.ckpt")) for run in ("unbroken", "killed")]
    assert kept[0] == kept[1]
