"""A real ``kill -9`` of a process with a mirror, then a new machine: what the mirror holds is whole, and restored."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from support import mirror_me
from support.forking import Program
from support.mirror_me import MIRROR_KEEP, POLICY, manager
from support.plain_format import PlainFormat
from support.sampling import some

from checkpointer import CheckpointManager

KILLS = some(30)
PATIENCE_S = 60.0
"""Only a failing test waits so long, in seconds."""

pytestmark = pytest.mark.slow


def run_and_kill(here: Path, there: Path, delay: float) -> tuple[int, int]:
    """Train until killed after ``delay`` seconds; return what was restored and the last acknowledged step."""
    process = Program(mirror_me.main, str(here), str(there))
    first = process.stdout.readline().split()
    assert ["restored"] == first[:1], process.stderr.read()
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    out, err = process.communicate(PATIENCE_S)
    assert "Error" not in err, err
    acknowledged = [int(line.split()[1]) for line in out.splitlines(keepends=True) if line.endswith("\n")]
    return int(first[1]), acknowledged[-1] if acknowledged else int(first[1])


def test_killed_at_random_instants_a_new_machine_goes_on_from_the_mirror(tmp_path: Path) -> None:
    """Each time the local disk is lost; each time the newest whole checkpoint of the mirror is restored."""
    dice = random.Random(8)
    here, there = tmp_path / "here", tmp_path / "there"
    mirrored = 0
    for kill in range(10 * KILLS):
        if mirrored and kill >= KILLS:  # On a loaded machine the first kills may come before the first copy.
            break
        restored, acknowledged = run_and_kill(here, there, dice.uniform(0.0, 0.3))
        assert mirrored == restored
        found = CheckpointManager(there, POLICY, format=PlainFormat()).restore()
        mirrored = 0 if found is None else found.step
        assert mirrored <= acknowledged + 1
        if found is not None:
            assert mirrored == found.state["step"]
        shutil.rmtree(here)
    assert mirrored > 0
    state: dict[str, object] = {"step": mirrored + 1}
    with manager(str(here), str(there), state) as training:
        assert mirrored == training.restore().step  # type: ignore[union-attr]
        training.observe({"loss": 1000.0}, step=mirrored + 1, epoch=0, epoch_end=False)
    left = CheckpointManager(there, POLICY, format=PlainFormat())
    assert len(left.records) <= sum(rule.k if hasattr(rule, "k") else rule.n for rule in MIRROR_KEEP)
    assert {record.name for record in left.session.manifest.records} == {
        path.name for path in there.glob("*.ckpt") if not path.is_symlink()
    }
    assert not (there / ".checkpointer/staging").exists()


def test_killed_at_random_instants_the_same_machine_catches_up(tmp_path: Path) -> None:
    """Nothing acknowledged here is lost, and in the end the mirror has the newest."""
    dice = random.Random(9)
    here, there = tmp_path / "here", tmp_path / "there"
    acknowledged = 0
    for kill in range(10 * KILLS):
        if acknowledged and kill >= KILLS:
            break
        restored, newest = run_and_kill(here, there, dice.uniform(0.0, 0.15))
        # One save may have become durable without its line being read.
        assert restored in (acknowledged, acknowledged + 1)
        acknowledged = newest
    with manager(str(here), str(there), {}) as training:
        here_now = training.restore()
    newest = here_now.step if here_now else 0
    assert newest in (acknowledged, acknowledged + 1)
    there_now = CheckpointManager(there, POLICY, format=PlainFormat()).restore()
    assert newest == (there_now.step if there_now else 0)
