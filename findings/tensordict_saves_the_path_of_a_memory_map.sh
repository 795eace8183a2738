#!/usr/bin/env bash
# tensordict 0.15.3: torch.save of a MemoryMappedTensor writes the path of its file, and none of its bytes, although it is
# a torch.Tensor. What is written to the file afterwards changes what the checkpoint holds, a digest of the checkpoint
# still fits, and a copy of the checkpoint on another machine has lost the values.
# Seen:
#   bytes of the checkpoint for 800000 bytes of values: fewer than 10000
#   loaded after the file was changed: 2.0 (saved: 1.0)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 tensordict==0.15.3
cd "$folder"
cat >shown.py <<'PY'
import os

import torch
from tensordict import MemoryMappedTensor

values = MemoryMappedTensor.from_tensor(torch.ones(200_000), filename="values.memmap")
assert isinstance(values, torch.Tensor)
torch.save({"values": values}, "checkpoint.pt")
size = os.path.getsize("checkpoint.pt")
values.fill_(2.0)
loaded = torch.load("checkpoint.pt", weights_only=False)["values"][0].item()
print(f"bytes of the checkpoint for 800000 bytes of values: {'fewer than 10000' if size < 10_000 else size}")
print(f"loaded after the file was changed: {loaded} (saved: 1.0)")
assert size < 10_000, "the behaviour has changed"
assert loaded == 2.0, "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
