"""Two ranks over gloo: they save, die, stop and fail together, and what is on record is whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

PATIENCE_S = 600.0
"""A run that takes this long (seconds) hangs."""
SCRIPT = "support.ranks_hf"


OLD = version("transformers").startswith("4.")
"""Does not evaluate at the end; and resumes on no two CPU processes, with or without us, for it loads to ``cpu:0``."""


def trainings(folder: Path, how: str) -> dict[str, Any]:
    """Return how each training of the script went, by its name."""
    environment = {**os.environ, "PYTHONPATH": ":".join(path for path in sys.path if path)}
    command = [sys.executable, "-W", "ignore", "-m", SCRIPT, str(folder), how]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE_S)
    assert 0 == done.returncode, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    return {line["name"]: line for line in lines}


@pytest.fixture(scope="module", params=["plain", "attached"])
def went(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the script once, with and without ``attach``."""
    how: str = request.param
    return {**trainings(tmp_path_factory.mktemp(how), how), "attached": how == "attached"}


def same(went: dict[str, Any], *names: str) -> bool:
    """Return whether every rank of these trainings ended with the same weights."""
    return 1 == len({rank["weights"] for name in names for rank in went[name]["ranks"]})


def is_resumed(went: dict[str, Any], name: str) -> bool:
    """Return whether the Trainer itself can resume two processes; where it cannot, see that it says so."""
    if OLD:
        assert all("tagged with cpu:0" in rank["error"] for rank in went[name]["ranks"])
    return not OLD


def test_a_checkpoint_counts_once_every_rank_has_written(went: dict[str, Any]) -> None:
    """Rank 1's random state comes late, and is in each checkpoint that is on record; a death before it undoes all."""
    for name in ("unbroken", "slow"):
        assert ["checkpoint-10", "checkpoint-9"] == sorted(went[name]["records"]) == went[name]["rank 1"]
        assert ["best", "checkpoint-10", "checkpoint-9", "last"] == went[name]["folders"]
        for rank in went[name]["ranks"]:
            assert (0, 10, 9 if OLD else 10) == (rank["status"], rank["step"], rank["best"][0])
    assert {"checkpoint-3": ["regular", 3]} == went["dies"]["records"]
    assert ("checkpoint-6" in went["dies"]["folders"]) is not went["attached"]
    assert ("incomplete-checkpoint-6" in went["resumes"]["folders"]) is not went["attached"]
    assert same(went, "unbroken", "slow")
    if is_resumed(went, "resumes"):
        assert [3, 3] == [rank["begin"] for rank in went["resumes"]["ranks"]]
        assert same(went, "unbroken", "resumes")


def test_rank_0_s_clock_counts_for_all(went: dict[str, Any]) -> None:
    """With a trigger that counts time every rank saves at the same steps, or they would wait for ever."""
    if went["attached"]:
        pytest.skip("the same with and without")
    assert [0, 0] == [rank["status"] for rank in went["time"]["ranks"]]
    assert ["checkpoint-10"] == went["time"]["folders"]


def test_a_signal_to_one_rank_saves_and_stops_all(went: dict[str, Any]) -> None:
    """All at one step; each ends by the signal, and a resume ends with the weights of an unbroken training."""
    if not went["attached"]:
        pytest.skip("takes attach()")
    assert [-signal.SIGTERM] * 2 == [rank["status"] for rank in went["signal"]["ranks"]]
    # A step that the policy saves anyway needs no rescue; which one it is depends on when the ranks communicate.
    step, kind = max((step, kind) for kind, step in went["signal"]["records"].values())
    assert 4 < step < 10
    assert ("regular" if step % 3 == 0 else "rescue") == kind
    assert f"checkpoint-{step}" in went["signal"]["rank 1"]
    if is_resumed(went, "after the signal"):
        assert [step] * 2 == [rank["begin"] for rank in went["after the signal"]["ranks"]]
        # An evaluation that was due at that very step was left out; the resume ran it, and drew its random numbers.
        assert same(went, "unbroken", "after the signal")


def test_a_signal_to_one_rank_within_an_evaluation_ends_it_on_all(went: dict[str, Any]) -> None:
    """They save that step without a metric. A resume evaluates it, and ends as an unbroken training does."""
    if not went["attached"]:
        pytest.skip("takes attach()")
    struck, resumed = went["in evaluation"], went["after the evaluation"]
    assert [-signal.SIGTERM] * 2 == [rank["status"] for rank in struck["ranks"]]
    assert (["regular", 6], ["checkpoint-6"]) == (struck["records"]["checkpoint-6"], struck["unmeasured"])
    if is_resumed(went, "after the evaluation"):
        assert [6] * 2 == [rank["begin"] for rank in resumed["ranks"]]
        assert same(went, "unbroken", "after the evaluation")
        assert set(resumed["unmeasured"]) <= {"checkpoint-10"}


def test_an_exception_on_one_rank_is_seen_as_itself_and_soon(went: dict[str, Any]) -> None:
    """Within two seconds of the time that it takes without us, and nothing acknowledged is lost."""
    if not went["attached"]:
        pytest.skip("takes attach()")
    ours, theirs = went["exception"]["ranks"], went["without"]["ranks"]
    assert "ZeroDivisionError: on one rank" == ours[1]["error"] == theirs[1]["error"]
    for rank in range(2):
        assert ours[rank]["took"] < theirs[rank]["took"] + 2.0
    assert {"checkpoint-3": ["regular", 3]} == went["exception"]["records"]
