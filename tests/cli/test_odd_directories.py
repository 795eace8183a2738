"""Commands on directories whose names, times and numbers are at the ends of what there is."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.odd_files import tensor, torch_file

from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy
from checkpointer.cli.app import run
from checkpointer.commit.index import load, record_path
from checkpointer.storage import open_storage


def saved(folder: Path) -> Path:
    """Write three checkpoints."""
    policy = Policy(EverySteps(1), [KeepLast(9)])
    with CheckpointManager(folder, policy, state=lambda: {"w": 1}) as manager:
        for step in (1, 2, 3):
            manager.observe({"loss": 1.0 / step}, step=step, epoch=0, epoch_end=False)
    return folder


def change(folder: Path, **fields: Any) -> None:
    """Change the record of step 2."""
    path = folder / record_path("epoch=0-step=2.ckpt")
    data = json.loads(path.read_bytes())
    data["record"] |= fields
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("time", [1e300, -1e300, 2.0**35, -(2.0**35)])
def test_a_time_that_is_no_date_is_damage_and_the_others_are_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], time: float
) -> None:
    """No system has a date for it."""
    change(saved(tmp_path), time=time)
    assert [1, 1] == [run([command, str(tmp_path)]) for command in ("ls", "verify")]
    assert 0 == run(["show", str(tmp_path), "3"])
    assert "seconds since 1970, before the year 3058" in capsys.readouterr().err


@pytest.mark.parametrize(
    "fields",
    [
        *({"time": time} for time in (2.0**35 - 1, 1 - 2.0**35, 0.0, -1)),
        *({"metrics": {"loss": value}} for value in (1.7e308, -1.7e308, 5e-324, "inf", "nan")),
        {"step": 2**63 - 1, "epoch": 2**63 - 1, "size": 2**63 - 1},
    ],
    ids=str,
)
def test_times_and_metrics_at_the_ends_of_the_range_are_shown(tmp_path: Path, fields: dict[str, Any]) -> None:
    """Every command that prints them ends as it should."""
    change(saved(tmp_path), **fields)
    (tmp_path / "p.yaml").write_text(
        "when: {EverySteps: {n: 1}}\nkeep: [{KeepBest: {k: 1, metric: loss, mode: min}}]\n"
    )
    policy = str(tmp_path / "p.yaml")
    for command in (["ls"], ["ls", "--json"], ["best", "--by", "loss", "--mode", "min"], ["prune", "--policy", policy]):
        assert 0 == run([command[0], str(tmp_path), *command[1:]])
    if "size" not in fields:
        assert 0 == run(["show", str(tmp_path), "epoch=0-step=2.ckpt"])


@pytest.fixture
def deep(tmp_path: Path) -> Iterator[Path]:
    """A folder that is removed with all that is in it, however deep: pytest cannot."""
    yield tmp_path / "deep"
    subprocess.run(["rm", "-rf", tmp_path / "deep"], check=True)


def test_folders_nested_a_thousand_deep_stop_nothing(deep: Path) -> None:
    """What lies deeper than the system has paths for is not listed."""
    saved(deep)
    here = os.open(deep, os.O_RDONLY)
    for _ in range(1100):
        os.mkdir("deeper", dir_fd=here)
        below = os.open("deeper", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    place = deep.joinpath("a", *["b"] * 400)
    place.mkdir(parents=True)
    (place / "odd_5.pt").write_bytes(torch_file({"w": tensor(), "step": 5}))
    assert [0, 0, 0] == [run([command, str(deep)]) for command in ("ls", "verify", "sweep")]
    assert 0 == run(["adopt", str(deep)])
    assert [2, 0] == [run(["show", str(deep)]), run(["show", str(deep / "a")])]
    assert 4 == len(load(open_storage(deep, "")).entries)


NAMES: dict[str, Callable[[Path], bytes]] = {
    "file": lambda folder: os.fsencode(folder) + b"/a\xed\xa0\x80_5.pt",
    "folder": lambda folder: os.fsencode(folder) + b"/\xff/a_5.pt",
}


@pytest.mark.parametrize("name", NAMES)
def test_half_a_surrogate_in_a_name_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """The file is named and left, and the others are adopted."""
    path = NAMES[name](tmp_path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as stream:
        stream.write(torch_file({"w": tensor(), "step": 5}))
    (tmp_path / "good.pt").write_bytes(torch_file({"w": tensor(), "step": 4}))
    assert 1 == run(["adopt", str(tmp_path)])
    out = capsys.readouterr().out
    assert "adopted  good.pt" in out
    assert "not valid Unicode" in out
    assert [0, 0, 0] == [run([command, str(tmp_path)]) for command in ("ls", "verify", "last")]
    assert ["good.pt"] == [r.name for r in CheckpointManager(open_storage(tmp_path, "")).records]
