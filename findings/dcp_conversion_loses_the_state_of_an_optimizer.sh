#!/usr/bin/env bash
# torch 2.13.0: torch_save_to_dcp and dcp_to_torch_save of torch.distributed.checkpoint.format_utils convert a checkpoint, and back.
# Keys that are numbers come back as texts, and the state of an optimizer has numbers for keys. Optimizer.load_state_dict takes
# a key that it does not know without an error, so the optimizer silently begins with new averages and step 0. Dictionaries that
# are empty are gone.
# Seen:
#   keys of the state: [0, 1] -> ['0', '1']
#   after load_state_dict: 0 of 2 parameters have a state
#   an empty dictionary: {} -> gone
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
cat >shown.py <<'PY'
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp

model = torch.nn.Linear(2, 2)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(1, 2)).sum().backward()
optimizer.step()
torch.save({"optimizer": optimizer.state_dict(), "counters": {}}, "before.pt")
torch_save_to_dcp("before.pt", "converted")
dcp_to_torch_save("converted", "after.pt")
before, after = (torch.load(name, weights_only=True) for name in ("before.pt", "after.pt"))
keys = [list(one["optimizer"]["state"]) for one in (before, after)]
print(f"keys of the state: {keys[0]} -> {keys[1]}")
fresh = torch.optim.AdamW(model.parameters())
fresh.load_state_dict(after["optimizer"])
with_state = sum(one in fresh.state for one in model.parameters())
print(f"after load_state_dict: {with_state} of 2 parameters have a state")
print("an empty dictionary: {} ->", after.get("counters", "gone"))
assert (keys, with_state) == ([[0, 1], ["0", "1"]], 0) and "counters" not in after, "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
