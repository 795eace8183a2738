#!/usr/bin/env bash
# torch 2.13.0: set_optimizer_state_dict takes a state of two groups for an optimizer that has one: all parameters get the
# learning rate of the last group, without an error. It takes a state of one group for an optimizer that has two as well, and
# leaves groups without a learning rate: the next step fails with KeyError: 'lr'. load_state_dict of an optimizer refuses both.
# Seen:
#   two groups (0.1, 0.2) into one; parameters and rate: [(4, 0.2)]
#   one group into two: [(2, None), (2, 0.5)]
#   load_state_dict: loaded state dict has a different number of parameter groups
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
cat >shown.py <<'PY'
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

model = torch.nn.ModuleDict({"backbone": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 2)})


def optimizer(*rates):
    parts = list(model.values()) if len(rates) == 2 else [model]
    groups = [{"params": list(part.parameters()), "lr": rate} for part, rate in zip(parts, rates)]
    made = torch.optim.Adam(groups)
    (model["backbone"](torch.ones(1, 2)) + model["head"](torch.ones(1, 2))).sum().backward()
    made.step()
    return made


def rates_after(saved, loaded):
    set_optimizer_state_dict(model, loaded, get_optimizer_state_dict(model, saved))
    return [(len(group["params"]), group.get("lr")) for group in loaded.param_groups]


two_to_one = rates_after(optimizer(0.1, 0.2), optimizer(0.5))
one_to_two = rates_after(optimizer(0.5), optimizer(0.1, 0.2))
try:
    optimizer(0.5).load_state_dict(optimizer(0.1, 0.2).state_dict())
    plain = "loaded"
except ValueError as error:
    plain = str(error)
print("two groups (0.1, 0.2) into one; parameters and rate:", two_to_one)
print("one group into two:", one_to_two)
print("load_state_dict:", plain)
assert [(4, 0.2)] == two_to_one and [(2, None), (2, 0.5)] == one_to_two and "different number" in plain, "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
