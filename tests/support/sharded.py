"""A training whose state is sharded over several processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


class Training:
    """A sharded net (FSDP2) and its optimizer; every rank gets the same batches."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 2))
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.step = 0

    def learn(self) -> float:
        inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(self.step))
        loss = self.model(inputs).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return float(loss.detach())

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "step": self.step, "note": ["plain", {"data": 1}]}

    def load(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.step = state["step"]

    def whole(self) -> list[list[float]]:
        """Return all parameters, unsharded, on every rank."""
        tensors = [p.full_tensor() if isinstance(p, DTensor) else p for p in self.model.parameters()]
        return [tensor.flatten().tolist() for tensor in tensors]
