"""FSDP2 on one rank: its shards are saved in the background, and put back bit by bit.

On several GPUs, also of several hosts, the same is checked with all ranks, over NCCL, in a directory that all of them
see: ``PYTHONPATH=.:benchmarks torchrun --nproc-per-node=2 -m gpu.sharding DIRECTORY``. Without GPUs it uses gloo.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from checkpointer import DistributedManager, EverySteps, KeepLast, Policy
from gpu.device import Run


def checked(run: Run) -> list[tuple[str, ...]]:
    """Train, save, train on, and restore, with NCCL on a GPU and gloo without one.

    Raises:
        AssertionError: If one bit differs.
    """
    backend = "nccl" if run.on_cuda else "gloo"
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        _saved_and_restored(run)
    finally:
        dist.destroy_process_group()
    return [(f"FSDP2 on one rank, {backend}", "torch-checkpointer", "each bit is equal", "")]


def on_all_ranks(folder: str) -> None:
    """Do the same on the ranks that torchrun has started, each with a GPU of its own."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    torch.manual_seed(0)
    _saved_and_restored(Run(device=device, megabytes=0, repeats=0, folder=folder, until=math.inf))
    if dist.get_rank() == 0:
        print(f"FSDP2 on {dist.get_world_size()} ranks, {dist.get_backend()}: each bit is equal")
    dist.destroy_process_group()


def _saved_and_restored(run: Run) -> None:
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(4)]).to(run.device)
    mesh = init_device_mesh(run.device, (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def state() -> dict[str, Any]:
        of_model, of_optimizer = get_state_dict(model, optimizer)
        return {"model": of_model, "optimizer": of_optimizer}

    def learn() -> None:
        optimizer.zero_grad()
        model(torch.randn(8, 64, device=run.device)).square().mean().backward()
        optimizer.step()

    policy = Policy(EverySteps(1), [KeepLast(1)])
    with DistributedManager(
        f"{run.folder}/shards", policy, state=state, format="dcp", background="wait"
    ) as manager:  # fmt: skip
        learn()
        saved = _bits(state())
        manager.observe({}, step=1, epoch=0, epoch_end=False)
        learn()  # While the save is written.
        manager.wait()
        assert saved != _bits(state())
        restored = manager.restore()
        assert restored is not None
        found = restored.state
        set_state_dict(model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
    assert saved == _bits(state())


def _bits(state: Any) -> list[tuple[str, bytes]]:
    found: list[tuple[str, bytes]] = []
    _each(state, "", lambda path, tensor: found.append((path, tensor.cpu().contiguous().numpy().tobytes())))
    return found


def _each(part: Any, path: str, call: Callable[[str, torch.Tensor], None]) -> None:
    if isinstance(part, dict):
        for name, value in part.items():
            _each(value, f"{path}/{name}", call)
    elif isinstance(part, torch.Tensor):
        call(path, part.full_tensor() if isinstance(part, dist.tensor.DTensor) else part)


if __name__ == "__main__":
    on_all_ranks(sys.argv[1])
