"""A state whose tensors are spread over processes is saved whole, or not at all."""

from __future__ import annotations

import functools
import pickle
import warnings
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from checkpointer_torch import Loop, load_weights
from support.sharded import Training
from support.together import together
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Replicate

from checkpointer import AtSteps, CheckpointManager, EverySteps, KeepLast, Policy
from checkpointer.distributed.manager import DistributedManager
from checkpointer.distributed.ranks import OneRank
from checkpointer.errors import CorruptError, PolicyError, RestoreError, SaveError
from checkpointer.formats.dcp_folder import DcpFormat

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:torch.distributed is")]

EACH = Policy(EverySteps(1), [KeepLast(1)])
WEIGHTS = Policy(EverySteps(1), [KeepLast(1)], contents="weights")
NEVER = Policy(AtSteps(), [KeepLast(1)])
WAY_OUT = 'DistributedManager(format="dcp")'


@attrs.define
class Holder:
    """Holds a tensor where no format looks for one."""

    tensor: Any


def refusals(rank: int, folder: Path) -> dict[str, str]:
    """Return what each way to save a sharded state says."""
    training = Training(0)
    training.learn()
    model: Any = training.model.state_dict
    shard = next(iter(model().values()))
    summands = DTensor.from_local(torch.ones(2), shard.device_mesh, [Partial()])
    elsewhere = DTensor.from_local(torch.ones(2), DeviceMesh("cpu", [1]), [Replicate()])
    said: dict[str, str] = {}

    def ranked(policy: Policy = EACH, **options: Any) -> None:
        with DistributedManager(folder / "ranked", policy, **{"state": training.state_dict, **options}) as manager:
            manager.observe({}, 1, 0)
            manager.rescue()
            manager.wait()

    def alone(policy: Policy = EACH, **options: Any) -> None:
        if rank == 0:
            with CheckpointManager(folder / "alone", policy, **{"state": model, **options}) as manager:
                manager.observe({}, 1, 0)
                manager.rescue()
                manager.wait()

    def loop(ranks: Any = None, **options: Any) -> None:
        with Loop(folder / "loop", EACH, options=options, ranks=ranks, model=training.model):
            pass

    def hidden_in_loop(**things: Any) -> None:
        with Loop(folder / "loop", EACH, model=training.model, **things) as loop:
            loop.step()

    def attempt(what: str, save: Any, *arguments: Any, **options: Any) -> None:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "contents='weights'")
                save(*arguments, **options)
        except (SaveError, PolicyError) as error:
            said[what] = str(error)
        else:
            said[what] = "nothing"

    for background in (None, "wait"):
        how = ", background" if background else ""
        attempt(f"ranked, torch{how}", ranked, background=background)
        attempt(f"ranked, safetensors{how}", ranked, state=model, format="safetensors", background=background)
        attempt(f"ranked, rescue{how}", ranked, NEVER, background=background)
        attempt(f"ranked, weights{how}", ranked, WEIGHTS, weights=model, background=background)
        for format in ("torch", "safetensors", "dcp"):
            attempt(f"{format}{how}", alone, format=format, background=background)
            attempt(f"{format}, rescue{how}", alone, NEVER, format=format, background=background)
            attempt(f"{format}, weights{how}", alone, WEIGHTS, weights=model, format=format, background=background)
        # A DCP folder has shards, but not within a value that one rank writes.
        inside = {"a tuple": ({"0.weight": shard},), "an object": Holder({"0.weight": shard}), "a set": {shard}}
        for what, value in inside.items():
            hidden: Any = functools.partial(dict, **{"0.weight": value})
            attempt(f"dcp, in {what}{how}", ranked, state=hidden, format="dcp", background=background)
        attempt(
            f"dcp, summands{how}", ranked, state=lambda: {"0.weight": summands}, format="dcp", background=background
        )
    for format in ("torch", "safetensors"):
        attempt(f"{format}, summands", alone, state=lambda: {"0.weight": summands}, format=format)
        attempt(f"{format}, elsewhere", alone, state=lambda: {"0.weight": elsewhere}, format=format)
        attempt(f"loop, {format}", loop, format=format)
    attempt("loop, one rank", loop, OneRank())
    attempt("loop, a function", hidden_in_loop, **{"0.weight": lambda: shard})
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
    """Each of two ranks has half of every parameter: a checkpoint would hold the half of one, without an error."""
    for rank, said in enumerate(together(2, refusals, tmp_path)):
        assert not isinstance(said, BaseException), said
        refused = {what: text for what, text in said.items() if text != "nothing"}
        silent = {what for what in said if what not in refused}
        only_on_rank_zero = {what for what in said if what.split(",")[0] in ("torch", "safetensors", "dcp")}
        only_on_rank_zero -= {what for what in said if what.startswith(("dcp, in", "dcp, summands"))}
        assert (only_on_rank_zero if rank else set()) == silent
        for what, text in refused.items():
            assert "0.weight" in text, what
            assert "other processes hold" in text, what
    assert [] == [path for path in tmp_path.rglob("*") if path.suffix in (".ckpt", ".safetensors", ".dcp")]


def leave_a_part(rank: int, folder: Path) -> None:
    if rank == 0:
        torch.save({"model": Training(0).model.state_dict()}, folder / "part.pt")
    torch.distributed.barrier()


def test_a_file_with_a_part_of_each_tensor_is_no_source_of_weights(tmp_path: Path) -> None:
    """As ``torch.save`` writes it on one rank: neither are its parts loaded, nor written to another file."""
    together(2, leave_a_part, tmp_path)
    net = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 2))
    before = [parameter.tolist() for parameter in net.parameters()]
    for source in (net, nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(10, 1))):
        with pytest.raises(RestoreError, match=r"0\.weight"):
            load_weights(source, tmp_path / "part.pt")
    assert before == [parameter.tolist() for parameter in net.parameters()]


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
