#!/usr/bin/env bash
# torch 2.13.0: a module that is pruned (nn.utils.prune), or normalised by the older nn.utils.weight_norm or spectral_norm,
# computes its weight at the start of a forward pass. After load_state_dict its `weight` is still that of before. What reads it
# without a forward pass (an export, a merge, a count of zeros, the end of the normalisation) takes the old numbers.
# parametrizations.weight_norm computes at each access.
# Seen:
#   prune: weight as saved after the load: False, after a forward pass: True
#   weight_norm: weight as saved after the load: False, after a forward pass: True
#   parametrizations.weight_norm: weight as saved after the load: True, after a forward pass: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
cat >shown.py <<'PY'
import torch
from torch import nn
from torch.nn.utils import prune

ways = {
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "weight_norm": nn.utils.weight_norm,
    "parametrizations.weight_norm": nn.utils.parametrizations.weight_norm,
}
seen = {}
for name, way in ways.items():
    torch.manual_seed(0)
    trained = way(nn.Linear(2, 2))
    loaded = way(nn.Linear(2, 2))
    loaded.load_state_dict(trained.state_dict())
    after_load = torch.equal(trained.weight, loaded.weight)
    loaded(torch.ones(1, 2))
    seen[name] = [after_load, torch.equal(trained.weight, loaded.weight)]
    print(f"{name}: weight as saved after the load: {after_load}, after a forward pass: {seen[name][1]}")
expected = {"prune": [False, True], "weight_norm": [False, True], "parametrizations.weight_norm": [True, True]}
assert expected == seen, f"the behaviour has changed: {seen}"
PY
venv/bin/python -W ignore shown.py
