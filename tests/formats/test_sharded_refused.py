"""A state whose tensors are spread over processes is saved whole, or not at all."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointer_torch import Loop
from support.sharded import Training
from support.together import together
from torch.distributed.fsdp import FullyShardedDataParallel

from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy
from checkpointer.distributed.manager import DistributedManager
from checkpointer.errors import CorruptError, PolicyError, SaveError
from checkpointer.formats.dcp_folder import DcpFormat

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:torch.distributed is")]

EACH = Policy(EverySteps(1), [KeepLast(1)])
WAY_OUT = 'DistributedManager(format="dcp")'


def refusals(rank: int, folder: Path) -> dict[str, str]:
    """Return what each way to save a sharded state says."""
    training = Training(0)
    training.learn()
    model: Any = training.model.state_dict
    said: dict[str, str] = {}

    def ranked(**options: Any) -> None:
        with DistributedManager(folder / "ranked", EACH, state=training.state_dict, **options) as manager:
            manager.observe({}, 1, 0)

    def alone(**options: Any) -> None:
        if rank == 0:
            with CheckpointManager(folder / "alone", EACH, **{"state": model, **options}) as manager:
                manager.observe({}, 1, 0)
                manager.wait()

    def loop() -> None:
        Loop(folder / "loop", EACH, model=training.model, optimizer=training.optimizer)

    def attempt(what: str, save: Any, **options: Any) -> None:
        try:
            save(**options)
        except (SaveError, PolicyError) as error:
            said[what] = str(error)

    attempt("ranked", ranked)
    attempt("ranked, background", ranked, background="wait")
    for format in ("torch", "safetensors", "dcp"):
        attempt(format, alone, format=format)
        attempt(f"{format}, background", alone, format=format, background="wait")
    attempt("loop", loop)
    return said


def refusal_of_fsdp1(rank: int, folder: Path) -> str:
    model = FullyShardedDataParallel(torch.nn.Linear(4, 4), device_id=torch.device("cpu"))
    with pytest.raises(PolicyError) as caught:
        Loop(folder / "loop", EACH, model=model, optimizer=torch.optim.Adam(model.parameters()))
    return str(caught.value)


def test_a_loop_refuses_the_older_fsdp(tmp_path: Path) -> None:
    """Its optimizers have shards for states, as plain tensors."""
    for said in together(2, refusal_of_fsdp1, tmp_path):
        assert "model is sharded over 2 processes by FullyShardedDataParallel" in said
        assert WAY_OUT in said


def test_a_shard_is_refused_by_name_whatever_would_write_it(tmp_path: Path) -> None:
    """Each of two ranks has half of every parameter: a file would hold the half of one."""
    first, second = together(2, refusals, tmp_path)
    assert 9 == len(first)
    assert {"ranked", "ranked, background", "loop"} == set(second)
    for what, said in first.items():
        assert "0.weight" in said, what
        assert "is a torch.distributed.tensor.DTensor" in said, what
        assert WAY_OUT in said, what
    assert [] == [path for path in tmp_path.rglob("*") if path.suffix in (".ckpt", ".safetensors", ".dcp")]


def alone_and_whole(rank: int, folder: Path) -> list[bool]:
    """Save what one process has all of, and return whether each format has it."""
    training = Training(0)
    whole = training.whole()[0]
    found = []
    for format in ("torch", "safetensors", "dcp"):
        manager = CheckpointManager(folder / format, EACH, state=training.model.state_dict, format=format)
        with manager:
            manager.observe({}, 1, 0)
            restored = manager.restore()
        assert restored is not None
        weight = restored.state["0.weight"]
        weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        found.append(whole == weight.flatten().tolist())
    with Loop(folder / "loop", EACH, model=training.model, optimizer=training.optimizer) as loop:
        for _ in loop.batches([1]):
            training.learn()
            loop.step()
    learned, other = training.whole(), Training(1)
    Loop(folder / "loop", EACH, model=other.model, optimizer=other.optimizer).resume()
    return [*found, learned == other.whole()]


def test_what_one_process_has_all_of_is_saved_and_restored(tmp_path: Path) -> None:
    """FSDP2 on one device, by every format and by a loop."""
    assert [[True] * 4] == together(1, alone_and_whole, tmp_path)


def test_a_folder_that_lacks_shards_is_corrupt(tmp_path: Path) -> None:
    """If a folder holds half of a tensor, the other half would be uninitialised memory."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    folder = tmp_path / "x.dcp"
    DcpFormat().write_folder({"w": torch.ones(4)}, str(folder))
    metadata = FileSystemReader(folder).read_metadata()
    stored: Any = metadata.state_dict_metadata["w"]
    stored.size = torch.Size([8])
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CorruptError, match="holds 4 of the 8 elements of w"):
        DcpFormat().read_folder(str(folder), weights_only=True, map_location="cpu")
