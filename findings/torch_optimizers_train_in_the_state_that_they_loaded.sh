#!/usr/bin/env bash
# torch 2.13.0: Optimizer.load_state_dict takes the tensors of the given dictionary over without a copy, if type and device fit.
# Module.load_state_dict copies. So a state that a program keeps, to go back to it after a divergence or to begin several trials
# from it, is changed by each step after the first load: the second load brings the weights back, and the averages of the
# diverged training with them. Two optimizers that loaded one state even share their averages.
# Seen:
#   the kept state after the load and three steps: exp_avg 0.1000 -> 0.3439, step 1.0 -> 4.0
#   the kept state of the module: unchanged
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
cat >shown.py <<'PY'
import copy

import torch

model = torch.nn.Linear(1, 1, bias=False)
optimizer = torch.optim.Adam(model.parameters(), lr=0.1)


def train(steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()


train(1)
kept = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
before = copy.deepcopy(kept)
model.load_state_dict(kept["model"])
optimizer.load_state_dict(kept["optimizer"])
train(3)
one, other = before["optimizer"]["state"][0], kept["optimizer"]["state"][0]
average = f"exp_avg {one['exp_avg'].item():.4f} -> {other['exp_avg'].item():.4f}"
print(f"the kept state after the load and three steps: {average}, step {one['step'].item()} -> {other['step'].item()}")
is_kept = torch.equal(before["model"]["weight"], kept["model"]["weight"])
print("the kept state of the module:", "unchanged" if is_kept else "changed")
assert is_kept and other["step"].item() == 4, "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
