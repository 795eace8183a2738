#!/usr/bin/env bash
# lightning 2.6.6: a loader that Fabric has set up counts its own passes and calls sampler.set_epoch with that count each time
# it is iterated over, which overrules what the program has set. A program that resumes at epoch 5 and calls set_epoch(5),
# as torch's documentation asks, gets the order of epoch 0.
# Seen:
#   the program set epoch 5, the sampler was at epoch 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 lightning==2.6.6
cd "$folder"
cat >shown.py <<'PY'
from lightning.fabric import Fabric
from torch.utils.data import DataLoader, DistributedSampler

sampler = DistributedSampler(range(8), num_replicas=1, rank=0)
loader = Fabric(accelerator="cpu", devices=1).setup_dataloaders(DataLoader(range(8), sampler=sampler))
sampler.set_epoch(5)
for _ in loader:
    break
print(f"the program set epoch 5, the sampler was at epoch {sampler.epoch}")
assert sampler.epoch == 0, "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
