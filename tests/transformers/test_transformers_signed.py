"""With a key, or where others are signed, a folder without a signed record is not resumed from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from checkpointer_transformers import last_valid_checkpoint
from checkpointer_transformers.find_checkpoint import clear
from hf_tiny import quiet
from support.commands import command
from support.odd_files import safetensors_file, tensor, torch_file

from checkpointer import CheckpointerWarning, HMACKey
from checkpointer.errors import NoValidCheckpointError

pytestmark = quiet

SECRET = b"0123456789abcdef0123456789abcdef"
KEY = HMACKey(SECRET)


def folder_of(directory: Path, step: int) -> Path:
    """Write the files of a checkpoint, as a Trainer without a callback writes them."""
    folder = directory / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "epoch": 1.0, "log_history": []}))
    header = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    (folder / "model.safetensors").write_bytes(safetensors_file(header, bytes(8)))
    for name in ("optimizer.pt", "scheduler.pt"):
        (folder / name).write_bytes(torch_file({"w": tensor()}))
    return folder


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A directory with a signed checkpoint of step 5, and a planted folder of step 9."""
    (tmp_path / "key").write_bytes(SECRET)
    folder_of(tmp_path / "run", 5)
    assert 0 == command("adopt", tmp_path / "run", "--key-file", tmp_path / "key").code
    folder_of(tmp_path / "run", 9)
    return tmp_path / "run"


@pytest.mark.parametrize("key", [KEY, None], ids=["with the key", "without it"])
def test_a_planted_folder_is_not_the_last_valid_one(planted: Path, key: HMACKey | None) -> None:
    """It has no record, so anyone may have written it."""
    assert str(planted / "checkpoint-5") == last_valid_checkpoint(planted, trust=key)
    shutil.rmtree(planted / "checkpoint-5")
    with pytest.raises(NoValidCheckpointError, match="checkpoint-9: it has no signed record: it was planted"):
        last_valid_checkpoint(planted, trust=key)


def test_the_trainer_does_not_find_it_either(planted: Path) -> None:
    """The Trainer takes the highest step by itself, so the folder gets another name, and the warning says which."""
    with pytest.warns(CheckpointerWarning, match="checkpoint-9 is not a whole checkpoint: .*no signed record"):
        clear(planted, {"trust": KEY})
    assert ["checkpoint-5", "incomplete-checkpoint-9"] == sorted(path.name for path in planted.glob("*check*-*"))


def test_with_a_key_a_folder_counts_only_with_its_record(tmp_path: Path) -> None:
    """Also if nothing is signed there; without a key it counts as before."""
    folder_of(tmp_path, 9)
    assert str(tmp_path / "checkpoint-9") == last_valid_checkpoint(tmp_path)
    with pytest.raises(NoValidCheckpointError, match="checkpoint-9: it has no signed record"):
        last_valid_checkpoint(tmp_path, trust=KEY)
