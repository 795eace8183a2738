"""The digits example on real data, killed at random instants: it ends with the weights of a run that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.sampling import some

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[1] / "examples/digits_loop.py"
PATIENCE_S = 300.0
"""A run that takes this long (seconds) hangs."""


def start(directory: Path) -> subprocess.Popen[str]:
    """Start the example in a process of its own."""
    command = [sys.executable, str(EXAMPLE), "--directory", str(directory), "--quiet"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> list[str]:
    """Let the example come to its end, and return the lines it prints."""
    out, err = process.communicate(timeout=PATIENCE_S)
    assert 0 == process.returncode, err
    return out.splitlines()


def files_of(directory: Path) -> set[tuple[str, int, int]]:
    """Return what can be seen of a directory's files: path, inode, size."""
    found = set()
    for folder, _, names in os.walk(directory):
        for path in (Path(folder, name) for name in names):
            try:
                stat = path.lstat()
            except FileNotFoundError:  # It went while we looked.
                continue
            found.add((str(path), stat.st_ino, stat.st_size))
    return found


def stop_after(process: subprocess.Popen[str], how: signal.Signals, directory: Path, changes: int, delay: float) -> int:
    """Wait until the directory has changed so often, and ``delay`` seconds more; then end the process.

    Changes are counted, and not seconds, so that the kill falls within the training on a slow and on a fast machine.
    """
    give_up = time.monotonic() + PATIENCE_S
    before = files_of(directory)
    while changes and process.poll() is None:
        assert time.monotonic() < give_up, "the example does not save"
        now = files_of(directory)
        changes -= now != before
        before = now
        time.sleep(0.0005)
    time.sleep(delay)
    process.send_signal(how)
    process.communicate(timeout=PATIENCE_S)
    return process.returncode


def last_step(directory: Path) -> int:
    """Return the step that ``last.ckpt`` holds, read by torch alone; 0 if there is no such link yet."""
    link = directory / "last.ckpt"
    if not link.is_symlink():
        return 0
    return int(torch.load(link, weights_only=True)["loop"]["step"])


def kept(directory: Path) -> set[str]:
    """Return the names of the checkpoints in a directory, aliases included."""
    return {path.name for path in directory.glob("*.ckpt")}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run that nothing interrupts: its directory and what it printed."""
    directory = tmp_path_factory.mktemp("unbroken") / "run"
    return directory, finish(start(directory))


@pytest.mark.parametrize(
    ("how", "stops", "seed"), [(signal.SIGKILL, 5, 1), (signal.SIGKILL, 5, 2), (signal.SIGINT, 3, 3)]
)
def test_a_run_stopped_anywhere_ends_with_the_weights_of_an_unbroken_one(
    tmp_path: Path, unbroken: tuple[Path, list[str]], how: signal.Signals, stops: int, seed: int
) -> None:
    """Killed or interrupted, often within a save; ``last.ckpt`` is whole each time and never goes back."""
    dice = random.Random(seed)
    directory = tmp_path / "run"
    reached = [0]
    changes = [dice.randint(1, 20) for _ in range(some(stops))]
    # The last one is not before the first checkpoint.
    for change in (*changes, 25):
        code = stop_after(start(directory), how, directory, change, dice.uniform(0.0, 0.1))
        assert 0 != code, "the run came to its end before it could be stopped"
        reached.append(last_step(directory))
    lines = finish(start(directory))
    assert sorted(reached) == reached
    assert 0 < reached[-1] <= last_step(directory)
    assert any(line.startswith("resumed from ") for line in lines)
    assert unbroken[1][-1].startswith("weights xxh3-128 ")
    assert unbroken[1][-1] == lines[-1]
    assert kept(unbroken[0]) == kept(directory)


def test_a_finished_run_only_shows_its_table_again(unbroken: tuple[Path, list[str]]) -> None:
    """Same table, same weights, and no payload is written anew."""
    directory, lines = unbroken
    before = {path: path.lstat().st_mtime_ns for path in directory.glob("*.ckpt")}
    again = finish(start(directory))
    assert again[0].startswith("resumed from ")
    assert lines == again[1:]
    assert before.items() >= {path: path.lstat().st_mtime_ns for path in directory.glob("epoch*.ckpt")}.items()
