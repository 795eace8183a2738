#!/usr/bin/env bash
# torch 2.13.0: get_optimizer_state_dict and get_state_dict of torch.distributed.checkpoint.state_dict are not free of
# effects. Of an optimizer that has not stepped yet they take a step themselves, with gradients of zero and a learning
# rate of 0, so that there is a state to return. The weights stay, but the step counts and averages do not: the training
# that follows is another one for Adam and its kin, for SGD with dampening, for Rprop; ASGD even gets a rate of 0.
# A template for a load, or a check of what would be saved, therefore changes a new training. One would expect a getter
# to change nothing.
#
# Seen (largest difference of the weights after three steps, with and without the call before the first one):
#   AdamW: 0.0455
#   SGD with dampening: 0.2153
#   Rprop: 0.3640
#   Adagrad: 0.0000
#   step count of AdamW before any step: 1.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
venv/bin/python -W ignore - <<'PY'
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "SGD with dampening": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, dampening=0.5),
    "Rprop": lambda parameters: torch.optim.Rprop(parameters, lr=0.1),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1, lr_decay=0.5),
}


def train(build, *, look_first):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = build(model.parameters())
    if look_first:
        get_optimizer_state_dict(model, optimizer)
    count = float(optimizer.state[model.weight].get("step", 0))
    for _ in range(3):
        optimizer.zero_grad()
        (model(torch.ones(4, 3)) - 1).square().mean().backward()
        optimizer.step()
    return model.weight.detach(), count


changed = []
for name, build in OPTIMIZERS.items():
    (looked, count), (plain, _) = train(build, look_first=True), train(build, look_first=False)
    difference = (looked - plain).abs().max().item()
    print(f"{name}: {difference:.4f}")
    if difference > 0.001:
        changed.append(name)
    if name == "AdamW":
        step_count = count
print(f"step count of AdamW before any step: {step_count}")
assert ["AdamW", "SGD with dampening", "Rprop"] == changed, f"the behaviour has changed: {changed}"
assert step_count == 1.0, "the behaviour has changed"
PY
