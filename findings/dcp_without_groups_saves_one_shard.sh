#!/usr/bin/env bash
# torch 2.13.0: torch.distributed.checkpoint.save(no_dist=True) of a sharded DTensor writes this rank's shard under the shape
# of the whole tensor. load(no_dist=True) into a whole tensor fills that shard's part and leaves the rest as it is: no error,
# no warning. A program that lets rank 0 save "without collectives" has lost the other ranks' weights.
# Seen (four values 0 1 2 3 on two ranks, saved by rank 0, loaded into a tensor of -1):
#   [0.0, 1.0, -1.0, -1.0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
cat >shown.py <<'PY'
import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor


def work(rank):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29611")
    dist.init_process_group("gloo", rank=rank, world_size=2)
    weights = distribute_tensor(torch.arange(4.0), init_device_mesh("cpu", (2,)), [Shard(0)])
    if rank == 0:
        dcp.save({"weights": weights}, checkpoint_id="saved", no_dist=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(work, nprocs=2)
    state = {"weights": torch.full((4,), -1.0)}
    dcp.load(state, checkpoint_id="saved", no_dist=True)
    seen = state["weights"].tolist()
    print(seen)
    assert [0.0, 1.0, -1.0, -1.0] == seen, f"the behaviour has changed: {seen}"
PY
venv/bin/python -W ignore shown.py
