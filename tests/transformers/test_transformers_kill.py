"""A Trainer that is killed while it writes a checkpoint: the next one resumes, and nothing acknowledged is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.sampling import EVERY, FIRST

pytestmark = pytest.mark.slow

PATIENCE_S = 900.0
"""A run that takes this long (seconds) hangs."""
PACE = min(EVERY, 6)
"""With fewer kills none would fall before the save counts, or none after it."""
SCRIPT = "support.kill_hf"


def kills(folder: Path, how: str, every: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return how an unbroken training went, and each that was killed and resumed."""
    environment = {**os.environ, "PYTHONPATH": ":".join(path for path in sys.path if path)}
    command = [sys.executable, "-W", "ignore", "-m", SCRIPT, str(folder), how, str(every * PACE), str(1 + FIRST % PACE)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE_S)
    assert 0 == done.returncode, done.stderr
    unbroken, *killed = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    return unbroken, killed


@pytest.mark.parametrize(("how", "every", "least"), [("plain", 1, 40), ("attached", 2, 24)])
def test_killed_at_any_change_on_disk_it_resumes_to_the_same_weights(
    tmp_path: Path, how: str, every: int, least: int
) -> None:
    """``resume_from_checkpoint=True`` takes the newest acknowledged one each time, torn files or not.

    Not attached, it may also take one that was whole before it was acknowledged. Attached, at every second change.
    """
    unbroken, killed = kills(tmp_path, how, every)
    assert least // PACE <= len(killed)
    for kill in killed:
        assert 0 == kill["status"], kill
        newest = max(int(name.removeprefix("checkpoint-")) for name in kill["had"])
        is_whole = "checkpoint-6" in kill["left"] and kill["begin"] == 6
        assert newest == kill["begin"] or (is_whole and how == "plain"), kill
        assert unbroken["weights"] == kill["weights"], kill
        assert unbroken["kept"] == kill["kept"], kill
        half_written = "checkpoint-6" in kill["left"] and not is_whole
        assert (["incomplete-checkpoint-6"] if half_written else []) == kill["aside"], kill
    assert {3, 6} == {kill["begin"] for kill in killed}
