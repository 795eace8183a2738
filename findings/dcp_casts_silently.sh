#!/usr/bin/env bash
# torch 2.13.0: torch.distributed.checkpoint.load checks shapes but not types. It copies what was saved into the tensor
# it is given, as Tensor.copy_ does: integers wrap around, fractions are cut off, float32 becomes bfloat16. No error and
# no warning. One would expect an error, as for a shape that differs.
#
# Seen:
#   int64 300 into int8: 44
#   float32 1.75 into int64: 1
#   float32 1.2345678 into bfloat16: 1.234375
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
venv/bin/python -W ignore - <<'PY'
import tempfile

import torch
import torch.distributed.checkpoint as dcp

cases = [(300, torch.int64, torch.int8), (1.75, torch.float32, torch.int64), (1.2345678, torch.float32, torch.bfloat16)]
seen = []
for value, saved, here in cases:
    folder = tempfile.mkdtemp()
    dcp.save({"w": torch.tensor([value], dtype=saved)}, checkpoint_id=folder, no_dist=True)
    state = {"w": torch.zeros(1, dtype=here)}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    seen.append(state["w"].item())
    print(f"{str(saved)[6:]} {value} into {str(here)[6:]}: {seen[-1]}")
assert [44, 1, 1.234375] == seen, f"the behaviour has changed: {seen}"
PY
