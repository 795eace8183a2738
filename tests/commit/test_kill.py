"""Real processes and a real ``kill -9`` at random instants: what was acknowledged is there afterwards."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from support import kill_me
from support.forking import Program
from support.plain_format import PlainFormat
from support.sampling import some

from checkpointer import CheckpointManager, EverySteps, KeepBest, Policy

KILLS = some(200)
PATIENCE_S = 60.0
"""Only a failing test waits so long, in seconds."""


def run_and_kill(directory: Path, last: str, delay: float, *more: str) -> tuple[int, int]:
    """Train until killed after ``delay`` seconds; return what was restored and the last acknowledged step."""
    process = Program(kill_me.main, str(directory), last, *more)
    first = process.stdout.readline().split()
    assert ["restored"] == first[:1], process.stderr.read()
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    out, err = process.communicate(PATIENCE_S)
    assert "Error" not in err, err
    # The kill may cut the last line short; a cut line is not an acknowledgement.
    acknowledged = [int(line.split()[1]) for line in out.splitlines(keepends=True) if line.endswith("\n")]
    return int(first[1]), acknowledged[-1] if acknowledged else int(first[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("last", "kills", "more"), [("link", KILLS // 2, ()), ("copy", KILLS // 2, ()), ("copy", some(30), ("background",))]
)
def test_killed_at_random_instants_nothing_acknowledged_is_lost(
    tmp_path: Path, last: str, kills: int, more: tuple[str, ...]
) -> None:
    """Half of 200 kills each with a linked and a copied last, some with a writer thread; foreign files stay."""
    dice = random.Random(20)
    foreign = tmp_path / "theirs.bin"
    foreign.write_bytes(b"mine")
    acknowledged = 0
    for kill in range(10 * kills):
        if acknowledged and kill >= kills:  # On a loaded machine the first kills may come before the first save.
            break
        restored, newest = run_and_kill(tmp_path, last, dice.uniform(0.0, 0.15), *more)
        # One save may have become durable without its line being read.
        assert restored in (acknowledged, acknowledged + 1)
        acknowledged = newest
    policy = Policy(EverySteps(1), [KeepBest(2, "loss", mode="min")], last=last, best="link")  # type: ignore[arg-type]
    state = {"step": acknowledged + 2}
    with CheckpointManager(tmp_path, policy, state=lambda: state, format=PlainFormat()) as manager:
        found = manager.restore()
        assert found is not None
        assert found.step in (acknowledged, acknowledged + 1)
        manager.observe({"loss": 1000.0}, step=acknowledged + 2, epoch=0, epoch_end=False)
        assert min(3, found.step + 1) == len(manager.records)
        assert {record.name for record in manager.records} | {"last.ckpt", "best.ckpt"} == {
            path.name for path in tmp_path.glob("*.ckpt")
        }
    assert b"mine" == foreign.read_bytes()
    assert not (tmp_path / ".checkpointer/staging").exists()
