"""A run that is killed and resumed ends with the very bits of one that was not."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from small import BATCHES, EPOCHS, die_at, run

STEPS = BATCHES * EPOCHS
PLACES = ("before", "within", "after", "end")
KINDS: dict[str, dict[str, Any]] = {
    "seeded": {},
    "drawn": {"seeded": False},
    "workers": {"workers": 2},
    "persistent": {"workers": 2, "persistent": True},
}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a run that nothing interrupts ends with."""
    ends = {name: run(tmp_path_factory.mktemp(name), None, kind) for name, kind in KINDS.items()}
    assert {0} == {code for code, _ in ends.values()}
    return {name: digest for name, (_, digest) in ends.items()}


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, STEPS))
def test_killed_in_any_step_and_resumed_it_ends_with_the_same_bits(
    tmp_path: Path, unbroken: dict[str, str], step: int
) -> None:
    """Twenty points: before, within and after each step, and after a validation; dropout and shuffling included."""
    place = "end" if step % BATCHES == 0 else PLACES[step % 3]
    assert (-signal.SIGKILL, "") == run(tmp_path, die_at(place, step), {})
    assert (0, unbroken["seeded"]) == run(tmp_path, None, {})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["drawn", "workers", "persistent"])
def test_killed_again_and_again_it_ends_with_the_same_bits(tmp_path: Path, unbroken: dict[str, str], name: str) -> None:
    """A shuffle drawn from the global generator, and workers that read ahead, are found again too."""
    for place, step in [("within", 2), ("after", 5), ("end", 7), ("before", 9), ("within", 20)]:
        assert (-signal.SIGKILL, "") == run(tmp_path, die_at(place, step), KINDS[name])
    assert (0, unbroken[name]) == run(tmp_path, None, KINDS[name])
