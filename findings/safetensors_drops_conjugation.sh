#!/usr/bin/env bash
# safetensors 0.8.0 with torch 2.13.0: z.conj() is lazy in torch: the same memory and a flag. save_file writes the memory
# and drops the flag, so that the file holds z. torch.save keeps the flag, and Tensor.numpy() refuses such a tensor.
# One would expect the conjugated values, or an error.
#
# Seen:
#   saved:  [(1-2j), (3+4j)]
#   loaded: [(1+2j), (3-4j)]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 safetensors==0.8.0
cd "$folder"
venv/bin/python -W ignore - <<'PY'
import torch
from safetensors.torch import load_file, save_file

saved = torch.tensor([1 + 2j, 3 - 4j]).conj()
save_file({"z": saved}, "z.safetensors")
loaded = load_file("z.safetensors")["z"]
print("saved: ", saved.tolist())
print("loaded:", loaded.tolist())
assert [1 + 2j, 3 - 4j] == loaded.tolist(), "the behaviour has changed"
PY
