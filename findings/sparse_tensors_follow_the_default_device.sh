#!/usr/bin/env bash
# torch 2.13.0: a sparse CPU tensor that is unpickled (pickle.loads, torch.load, also with map_location="cpu") is made on the
# *default device*, and a dense one is not. Where a model is built under torch.device("meta"), to fill it afterwards, a state
# that is loaded there loses the values of its sparse tensors. Nothing is raised.
# Seen:
#   dense: pickle.loads: cpu, torch.load: cpu
#   sparse: pickle.loads: meta, torch.load: meta
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
cat >shown.py <<'PY'
import pickle

import torch

dense = torch.tensor([1.0, 0.0, 2.0])
seen = {}
for name, tensor in {"dense": dense, "sparse": dense.to_sparse()}.items():
    torch.save(tensor, "tensor.pt")
    with torch.device("meta"):
        plain = pickle.loads(pickle.dumps(tensor))
        loaded = torch.load("tensor.pt", map_location="cpu", weights_only=True)
    seen[name] = [plain.device.type, loaded.device.type]
    print(f"{name}: pickle.loads: {plain.device.type}, torch.load: {loaded.device.type}")
assert {"dense": ["cpu", "cpu"], "sparse": ["meta", "meta"]} == seen, "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
