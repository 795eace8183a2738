"""What the examples claim."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
def test_the_mean_of_the_best_three_is_no_worse_than_the_best_alone(tmp_path: Path) -> None:
    """On the test digits, which neither the training nor the ranking has seen."""
    command = [sys.executable, str(EXAMPLES / "average_best.py"), "--directory", str(tmp_path / "run")]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout

    alone, mean = re.findall(r"test loss ([0-9.]+), ([0-9.]+)% right", out)
    assert float(mean[1]) >= float(alone[1])
    assert float(mean[0]) <= float(alone[0])
