"""A tensor of which another process holds the other half, without that process."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard


def half() -> Any:
    """Return half of a tensor; torch's own fake backend stands for the other process, and is gone afterwards."""
    hook = sys.excepthook
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        return DTensor.from_local(torch.ones(2), init_device_mesh("cpu", (2,)), [Shard(0)])
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook
