#!/usr/bin/env bash
# torch-optimi 0.3.3: with gradient_release=True the state of each parameter refers to the group of the optimizer, and the step of a
# parameter takes its learning rate from there. The state_dict() holds this reference, and load_state_dict makes a copy of what it
# finds. So after a resume each parameter has a group of its own, which a scheduler does not change: the rate stays as it was at the
# save until the training ends. param_groups and get_last_lr() show the right rates.
# Seen (LambdaLR that halves the rate at each step, saved after step 3):
#   rates that the steps use, unbroken: 0.1 0.05 0.025 0.0125 0.00625 0.003125
#   resumed after step 3:               0.0125 0.0125 0.0125
#   rates in param_groups then:         0.0125 0.00625 0.003125
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 torch-optimi==0.3.3 packaging==26.3
cd "$folder"
cat >shown.py <<'PY'
import torch
from optimi import AdamW, prepare_for_gradient_release

DATA = torch.ones(8, 2)


def made():
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    optimizer = AdamW(model.parameters(), lr=0.1, gradient_release=True)
    prepare_for_gradient_release(model, optimizer)
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)


def train(model, optimizer, scheduler, steps):
    used, shown = [], []
    for _ in range(steps):
        used.append(round(optimizer.state[model.weight]["group"]["lr"], 7))
        shown.append(round(optimizer.param_groups[0]["lr"], 7))
        model(DATA).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return used, shown


parts = made()
unbroken = train(*parts, 6)[0]
print("rates that the steps use, unbroken:", *unbroken)
first, second = made(), made()
train(*first, 3)
for one, other in zip(first, second, strict=True):
    other.load_state_dict(one.state_dict())
used, shown = train(*second, 3)
print("resumed after step 3:              ", *used)
print("rates in param_groups then:        ", *shown)
assert shown == unbroken[3:] and used == [0.0125] * 3, "the behaviour has changed"
assert not torch.equal(parts[0].weight, second[0].weight), "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
