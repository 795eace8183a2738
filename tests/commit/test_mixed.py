"""Signed and unsigned records in one directory, and no key: what is not signed may be planted, and is not believed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointer_torch import load_weights
from support.commands import command, snapshot

from checkpointer import CheckpointerWarning, CheckpointManager, EverySteps, HMACKey, KeepAll, KeepBest, Mirror, Policy
from checkpointer.errors import NoValidCheckpointError, RestoreError, UntrustedError
from checkpointer.storage import open_storage
from checkpointer.tools.catalog import look_at

KEY = HMACKey(b"0123456789abcdef0123456789abcdef")
ALL = Policy(EverySteps(1), [KeepAll(), KeepBest(1, "loss", mode="min")])
PLANT = "planted.ckpt"
UNSIGNED = r"\.checkpointer/records/planted\.ckpt\.json is not signed: it was planted, or saved without trust="


def train(directory: Path, *losses: float, trust: HMACKey | None = KEY, **kw: Any) -> None:
    """Save one checkpoint per loss, whose state is its loss."""
    box = {"w": torch.zeros(2)}
    with CheckpointManager(directory, kw.pop("policy", ALL), state=lambda: dict(box), trust=trust, **kw) as manager:
        for step, loss in enumerate(losses, start=1):
            box["w"] = torch.full((2,), loss)
            manager.observe({"loss": loss}, step=step, epoch=0, epoch_end=False)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two signed checkpoints, and a planted one with a better metric and a later step."""
    directory = tmp_path / "run"
    train(directory, 0.9, 0.5)
    return planted(directory, tmp_path)


def planted(directory: Path, tmp_path: Path) -> Path:
    """Plant a checkpoint, as an attacker without the key can."""
    source = tmp_path / "source"
    train(source, 0.01, trust=None, policy=Policy(EverySteps(1), [KeepAll()], name="planted"))
    run = look_at(open_storage(directory, "")).records[0].run
    data = json.loads((source / f".checkpointer/records/{PLANT}.json").read_bytes())
    data["record"] |= {"step": 1000, "serial": 1000, "run": run}
    shutil.copy(source / PLANT, directory / PLANT)
    (directory / f".checkpointer/records/{PLANT}.json").write_text(json.dumps(data))
    return directory


def reader(directory: Path | None, **kw: Any) -> CheckpointManager:
    """A manager that only reads, without the key."""
    return CheckpointManager(directory, ALL, **kw)


@pytest.mark.parametrize(("which", "step"), [(None, 2), ("last", 2), ("best", 2)])
def test_a_restore_without_the_key_takes_a_signed_one_and_names_the_other(
    mixed: Path, which: str | None, step: int
) -> None:
    """The warning says what is not believed and what to do if it is one's own."""
    before = snapshot(mixed)
    with reader(mixed) as manager:
        assert ["epoch=0-step=1.ckpt", "epoch=0-step=2.ckpt"] == [record.name for record in manager.records]
        with pytest.warns(CheckpointerWarning, match=f"{UNSIGNED}.*another directory, and run 'checkpointer adopt'"):
            restored = manager.restore(which)
        assert restored is not None
        assert (step, step) == (restored.step, manager.best.step if manager.best else None)
    assert before == snapshot(mixed)


@pytest.mark.parametrize("which", [PLANT, "planted", 1000])
def test_the_planted_one_is_not_restored_by_its_name_or_step(mixed: Path, which: str | int) -> None:
    """The error names its record."""
    with reader(mixed) as manager, pytest.raises(RestoreError, match=UNSIGNED):
        manager.restore(which)


def test_nothing_but_planted_ones_with_a_payload_is_an_error(mixed: Path) -> None:
    """If the payloads of the signed ones are gone, training does not go on from the planted one."""
    for step in (1, 2):
        (mixed / f"epoch=0-step={step}.ckpt").unlink()
    with pytest.warns(CheckpointerWarning, match="are gone"):
        manager = reader(mixed)
    with manager, pytest.raises(NoValidCheckpointError, match=UNSIGNED):
        manager.restore()


def test_a_size_only_restore_without_the_key_is_still_possible(mixed: Path) -> None:
    """Only with a key it is refused."""
    with reader(mixed) as manager, pytest.warns(CheckpointerWarning, match=UNSIGNED):
        assert manager.restore(verify="size") is not None


@pytest.mark.parametrize("by", [lambda folder: folder, lambda folder: folder / PLANT], ids=["directory", "file"])
def test_load_weights_without_the_key_takes_a_signed_one_or_none(mixed: Path, by: Callable[[Path], Path]) -> None:
    """The newest signed one of a directory; a planted one that is named is refused."""
    model = torch.nn.ParameterDict({"w": torch.zeros(2)})
    if by(mixed) == mixed:
        with pytest.warns(CheckpointerWarning, match=UNSIGNED):
            load_weights(model, mixed)
        assert 0.5 == model["w"][0].item()
        return
    with pytest.raises(RestoreError, match=UNSIGNED):
        load_weights(model, by(mixed))
    assert 0.0 == model["w"][0].item()


def test_a_mirror_is_read_by_the_same_rule(mixed: Path, tmp_path: Path) -> None:
    """A machine without anything, and a mirror with a planted checkpoint."""
    with (
        reader(tmp_path / "new", mirror=Mirror(mixed)) as manager,
        pytest.warns(CheckpointerWarning, match=f"on the mirror {UNSIGNED}"),
    ):
        restored = manager.restore()
    assert restored is not None
    assert (2, 0.5) == (restored.step, restored.state["w"][0].item())


@pytest.mark.parametrize("run", [None, "named"])
def test_a_writer_without_the_key_changes_nothing(mixed: Path, run: str | None) -> None:
    """It is refused when it opens the directory, also if it names the run that it goes on with."""
    before = snapshot(mixed)
    name = run and look_at(open_storage(mixed, "")).records[0].run
    with pytest.raises(UntrustedError, match=r"2 checkpoints in .* are signed"):
        CheckpointManager(mixed, ALL, state=dict, run=name)
    assert before == snapshot(mixed)


def test_a_file_that_is_named_by_its_path_is_read_by_the_same_rule(mixed: Path, tmp_path: Path) -> None:
    """`export`, `diff`, `show` and `verify` of a path look for the records beside it, with the key and without it."""
    path, out = mixed / PLANT, tmp_path / "out.pt"
    keys: tuple[tuple[object, ...], ...] = ((), ("--key-file", tmp_path / "key"))
    for key in keys:
        (tmp_path / "key").write_bytes(b"0123456789abcdef0123456789abcdef")
        for name in ("export", "diff"):
            said = command(name, path, out if name == "export" else path, *key)
            assert (2, True, False) == (said.code, "is not signed" in said.err, out.exists()), (name, said)
        for name in ("show", "verify"):
            said = command(name, path, *key)
            assert said.code != 0, (name, said)
            assert "is not signed" in said.out + said.err
    said = command("export", mixed / "epoch=0-step=2.ckpt", out)
    assert (1, True) == (said.code, "2 of 3 records are signed, and no signature was checked" in said.err), said


def test_a_writer_without_the_key_of_its_mirror_goes_on_alone(mixed: Path, tmp_path: Path) -> None:
    """The mirror is not changed, and close() does not wait for it: no later try would end in another way."""
    before = snapshot(mixed)
    with (
        pytest.warns(CheckpointerWarning, match=r"the mirror .* is behind \(UntrustedError: 2 checkpoints .* signed"),
        CheckpointManager(tmp_path / "new", ALL, state=dict, mirror=Mirror(mixed)) as manager,
    ):
        manager.observe({"loss": 0.1}, step=1, epoch=0)
    assert before == snapshot(mixed)
