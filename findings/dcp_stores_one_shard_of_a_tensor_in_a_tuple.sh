#!/usr/bin/env bash
# torch 2.13.0, torch.distributed.checkpoint.save: a DTensor in a list or dict of the state is stored whole, each rank its
# shard. In a tuple (a set or an object likewise) it is a plain value: one rank pickles it, and with it only its own shard.
# There is no error and no warning. After a load the tensor says that it has four elements, and holds two.
# Seen (two gloo processes):
#   list: TensorStorageMetadata, loaded [0.0, 0.0, 1.0, 1.0]
#   tuple: BytesStorageMetadata, loaded [1.0, 1.0] of a shape of 4
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
cat >shown.py <<'PY'
import os
import tempfile
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load, save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard


def run(rank, folder):
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    whole = DTensor.from_local(torch.full((2,), float(rank)), mesh, [Shard(0)])
    save({"list": [whole], "tuple": (whole,)}, storage_writer=FileSystemWriter(f"{folder}/saved"))
    if rank == 0:
        reader = FileSystemReader(f"{folder}/saved")
        kinds = {name: type(kind).__name__ for name, kind in reader.read_metadata().state_dict_metadata.items()}
        state = {"list": [torch.zeros(4)], "tuple": None}
        load(state, storage_reader=reader, no_dist=True)
        first, second = state["list"][0].tolist(), state["tuple"][0]
        print(f"list: {kinds['list.0']}, loaded {first}")
        print(f"tuple: {kinds['tuple']}, loaded {second.to_local().tolist()} of a shape of {second.shape[0]}")
        assert [0.0, 0.0, 1.0, 1.0] == first, "the behaviour has changed"
        assert (2, 4) == (len(second.to_local()), second.shape[0]), "the behaviour has changed"
    dist.barrier()


if __name__ == "__main__":
    mp.spawn(run, (os.path.abspath(tempfile.mkdtemp(dir=".")),), 2)
PY
venv/bin/python shown.py
