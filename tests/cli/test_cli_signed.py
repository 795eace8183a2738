"""A signed directory without its key: readers say so, believe nothing that is not signed, and change nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.commands import command, snapshot, train

from checkpointer import EverySteps, HMACKey, KeepAll, Policy
from checkpointer.commit.changes import CHANGES
from checkpointer.records.record import Entry
from checkpointer.storage import open_storage
from checkpointer.storage.digests import digest_of
from checkpointer.tools.catalog import look_at

ALL = Policy(EverySteps(1), [KeepAll()])
FIRST, SECOND, PLANT = "epoch=0-step=10.ckpt", "epoch=1-step=20.ckpt", "plant-step=10.ckpt"
NEEDS_KEY = "2 of 2 records are signed, and no signature was checked: pass --key-env or --key-file"


@pytest.fixture
def signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two signed checkpoints, whose key is in the environment."""
    monkeypatch.setenv("CKPT_KEY", "0f3c5a" * 8)
    return train(tmp_path / "signed", 0.5, 0.4, policy=ALL, trust=HMACKey.from_env("CKPT_KEY"))


def plant(signed: Path, tmp_path: Path) -> None:
    """Put a checkpoint of a better metric and a later step into the directory, as an attacker without the key can."""
    source = train(tmp_path / "plant", 0.1, policy=Policy(EverySteps(1), [KeepAll()], name="plant-{step}"))
    shutil.copy(source / PLANT, signed / PLANT)
    data = json.loads((source / f".checkpointer/records/{PLANT}.json").read_bytes())
    run = look_at(open_storage(signed, "")).records[0].run
    data["record"] |= {"step": 1000, "serial": 1000, "run": run}
    (signed / f".checkpointer/records/{PLANT}.json").write_text(json.dumps(data))


def readers(signed: Path, tmp_path: Path) -> list[tuple[Any, ...]]:
    """Each command that only reads the directory."""
    policy, out = tmp_path / "policy.yaml", tmp_path / "out"
    ALL.to_yaml(policy)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    return [
        ("ls", signed),
        ("ls", signed, "--json"),
        ("show", signed, FIRST),
        ("show", signed, "--run", look_at(open_storage(signed, "")).records[0].run),
        ("last", signed),
        ("best", signed, "--by", "loss", "--mode", "min"),
        ("verify", signed),
        ("diff", signed, FIRST, FIRST),
        ("export", signed, FIRST, out / "w.safetensors"),
        ("average", signed, "--best", 2, "--by", "loss", "--mode", "min", "-o", out / "mean.pt"),
        ("simulate", signed, "-p", policy),
        ("report", signed, out / "report.html"),
        ("plot", signed, out / "plot.png"),
        ("prune", signed, "-p", policy),
    ]


def test_without_the_key_each_reader_says_that_no_signature_was_checked(signed: Path, tmp_path: Path) -> None:
    """On stderr, with the number of records; the exit code is 0. With the key nothing is said."""
    for argv in readers(signed, tmp_path):
        said = command(*argv)
        assert (0, True) == (said.code, NEEDS_KEY in said.err), (argv, said)
    for argv in readers(signed, tmp_path):
        said = command(*argv, "--key-env", "CKPT_KEY")
        assert (0, False) == (said.code, "no signature" in said.err), (argv, said)


def test_where_signed_and_unsigned_records_are_mixed_each_reader_exits_with_1(signed: Path, tmp_path: Path) -> None:
    """With the key and without it; the planted checkpoint is neither listed, ranked, averaged nor printed."""
    plant(signed, tmp_path)
    before = snapshot(signed)
    for argv in readers(signed, tmp_path):
        said = command(*argv)
        assert 1 == said.code, (argv, said)
        assert "2 of 3 records are signed, and no signature was checked" in said.err, argv
        assert PLANT not in said.out or argv[0] == "verify", argv
    assert f"{signed / SECOND}\n" == command("last", signed).out
    assert f"{signed / SECOND}\n" == command("best", signed, "--by", "loss", "--mode", "min").out
    assert f"{signed / SECOND}\n" == command("last", signed, "--key-env", "CKPT_KEY").out
    assert f"BAD   .checkpointer/records/{PLANT}.json: " in command("verify", signed).out
    said = command("export", signed, PLANT, tmp_path / "planted.pt")
    assert (2, True) == (said.code, "is not signed: it was planted, or saved without trust=" in said.err)
    assert before == snapshot(signed)


def test_changes_that_are_announced_without_a_signature_are_not_believed(signed: Path) -> None:
    """An announced replacement of a signed checkpoint would give its name to another payload."""
    first = look_at(open_storage(signed, "")).records[0]
    (signed / FIRST).write_bytes(b"planted" * 100)
    found = digest_of(open_storage(signed, ""), FIRST, "sha256")
    assert found is not None
    data = first.to_dict() | {"size": found[0], "digest": found[1], "serial": 99, "step": 99, "token": "t"}
    planted = Entry.from_dict({"schema": 1, "status": "pending", "record": data, "previous": first.to_dict()}, "")
    owner = "node7_1234abcd_99~17~5~0123456789ab"
    changes = {"schema": 1, "owner": owner, "entries": [planted.to_dict()], "aliases": [], "term": 1}
    (signed / CHANGES).mkdir(exist_ok=True)
    (signed / CHANGES / f"{owner}.json").write_text(json.dumps(changes))
    said = command("last", signed)
    assert (1, f"{signed / SECOND}\n") == (said.code, said.out)
    assert "is not signed" in said.err


def test_the_runs_below_a_directory_are_shown_with_what_is_not_checked(signed: Path, tmp_path: Path) -> None:
    """Also in JSON, as the error of that directory."""
    plant(signed, tmp_path)
    said = command("ls", tmp_path)
    assert (1, True) == (said.code, "2 of 3 records are signed, and no signature was checked" in said.out), said
    runs = {run["directory"]: run for run in command("ls", tmp_path, "--json").data}
    assert (2, "") == (runs["signed"]["checkpoints"], runs["plant"]["error"])
    assert "no signature was checked" in runs["signed"]["error"]


def test_a_planted_alias_marker_names_no_best_checkpoint(signed: Path) -> None:
    """Without a signature it is not a marker of this run, with the key and without it."""
    (signed / "best.ckpt").symlink_to(FIRST)
    marker = signed / ".checkpointer/aliases/best.ckpt.json"
    marker.parent.mkdir(exist_ok=True)
    marker.write_text(json.dumps({"schema": 1, "alias": "best.ckpt", "label": "", "owner": ""}))
    for key in ((), ("--key-env", "CKPT_KEY")):
        assert (2, "") == (command("best", signed, *key).code, command("best", signed, *key).out)
