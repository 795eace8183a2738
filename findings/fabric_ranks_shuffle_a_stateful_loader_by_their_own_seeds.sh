#!/usr/bin/env bash
# lightning 2.6.6, torchdata 0.11.0, two processes: Fabric replaces the sampler of a torch DataLoader(shuffle=True) by a
# DistributedSampler, whose order is that of one seed for all. It does not know the sampler of a StatefulDataLoader, and so
# wraps it: each process shuffles by its own random numbers, and takes every other item of its own order. Without the same
# seed in all processes, items come twice in an epoch and others never. Nothing is said.
# Seen:
#   DataLoader: 12 of 12 items in an epoch of two processes
#   StatefulDataLoader: 8 of 12 items in an epoch of two processes
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 lightning==2.6.6 torchdata==0.11.0
cd "$folder"
cat >shown.py <<'PY'
import torch
from lightning.fabric import Fabric
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader


def run(fabric):
    for kind in (DataLoader, StatefulDataLoader):
        torch.manual_seed(fabric.global_rank)
        loader = fabric.setup_dataloaders(kind(range(12), batch_size=2, shuffle=True))
        items = fabric.all_gather(torch.cat(list(loader)))
        count = len(set(items.flatten().tolist()))
        fabric.print(f"{kind.__name__}: {count} of 12 items in an epoch of two processes")
        assert (count == 12) == (kind is DataLoader), "the behaviour has changed"


if __name__ == "__main__":
    Fabric(accelerator="cpu", devices=2, strategy="ddp_spawn").launch(run)
PY
venv/bin/python -W ignore shown.py 2>&1 | grep " of 12 "
