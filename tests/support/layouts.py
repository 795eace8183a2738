"""Small trainings whose state is spread over processes in one layout or another."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.data import DataLoader, Dataset, DistributedSampler

SAMPLES = 48
BATCH = 2


class Numbered(Dataset[torch.Tensor]):
    """Each sample has its number as its first value."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, 1.0, index % 3, 0.5])


class Net(nn.Module):
    """Two layers that are sharded, and a norm that some layouts leave replicated."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.norm = nn.LayerNorm(8)
        self.down = nn.Linear(8, 4)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(self.norm(torch.tanh(self.up(batch))))
        return out


def _tensor_parallel(net: Net, mesh: Any) -> None:
    for layer in (net.up, net.down):
        parallelize_module(layer, mesh, ColwiseParallel(output_layouts=Replicate()))


class SpreadTraining:
    """A net, an optimizer and a schedule in one layout, and each rank's part of the data."""

    def __init__(self, layout: str, seed: int, loader: Callable[..., Any] = DataLoader) -> None:
        torch.manual_seed(seed)
        self.net, size = Net(), dist.get_world_size()
        self.replicated: list[nn.Parameter] = []
        replicas, share = size, dist.get_rank()
        if layout == "fsdp":
            fully_shard(self.net, mesh=init_device_mesh("cpu", (size,)))
        elif layout == "hsdp":
            fully_shard(self.net, mesh=init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("copy", "shard")))
        elif layout == "tp":
            _tensor_parallel(self.net, init_device_mesh("cpu", (size,)))
            replicas, share = 1, 0
        elif layout == "fsdp+tp":
            mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("data", "tensor"))
            _tensor_parallel(self.net, mesh["tensor"])
            fully_shard(self.net, mesh=mesh["data"])
            replicas, share = 2, mesh.get_local_rank("data")
        elif layout == "mixed":
            fully_shard(self.net.up, mesh=init_device_mesh("cpu", (size,)))
            self.replicated = [*self.net.norm.parameters(), *self.net.down.parameters()]
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.05)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, gamma=0.5)
        data = Numbered()
        sampler: DistributedSampler[torch.Tensor] = DistributedSampler(data, replicas, share, shuffle=True, seed=1)
        self.loader = loader(data, batch_size=BATCH, sampler=sampler)
        # Ranks that share tensors draw the same numbers.
        torch.manual_seed(100 * seed + share)
        random.seed(100 * seed + share)

    @property
    def objects(self) -> dict[str, Any]:
        """What a Loop is given."""
        return {"model": self.net, "optimizer": self.optimizer, "schedule": self.schedule}

    def learn(self, batch: torch.Tensor) -> None:
        """Take a step; each rank adds numbers of its own."""
        noisy = batch / SAMPLES + torch.randn_like(batch) + random.random()
        self.optimizer.zero_grad()
        self.net(noisy).square().mean().backward()
        for parameter in self.replicated:
            dist.all_reduce(parameter.grad)
        self.optimizer.step()
        self.schedule.step()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the weights and the optimizer's tensors, by name."""
        found: dict[str, torch.Tensor] = dict(self.net.state_dict())
        for number, values in self.optimizer.state_dict()["state"].items():
            found |= {f"{number}.{key}": value for key, value in values.items()}
        return found

    def digest(self) -> str:
        """Return what this rank has: its shards, and what it would draw next."""
        own = [one.to_local() if isinstance(one, DTensor) else one for one in self.tensors().values()]
        drawn = repr((random.getstate(), self.schedule.state_dict())).encode()
        arrays = [one.detach().contiguous().numpy().tobytes() for one in (*own, torch.get_rng_state())]
        return xxhash.xxh3_128_hexdigest(b"".join(arrays) + drawn)

    def whole(self) -> dict[str, list[float]]:
        """Return all tensors whole, on every rank."""
        return {
            name: (one.full_tensor() if isinstance(one, DTensor) else one).flatten().tolist()
            for name, one in self.tensors().items()
        }
