#!/usr/bin/env bash
# torch 2.13.0: whether a resume may load the optimizer before it builds the scheduler depends on the scheduler's class.
# LambdaLR and OneCycleLR write their first learning rate into the optimizer when they are built, and load_state_dict of
# the scheduler does not put the right one back: until the next scheduler.step(), which may be a whole epoch away, the
# training runs with the first rate. ExponentialLR, StepLR and CosineAnnealingLR leave the loaded rate alone.
# scheduler.get_last_lr() shows the right rate all the while, so that a log of it hides what is used.
#
# Seen (the rate when it was saved; the one that is used after the resume; the one that get_last_lr() gives):
#   ExponentialLR: 0.00625 0.00625 0.00625
#   StepLR: 0.00100 0.00100 0.00100
#   CosineAnnealingLR: 0.06545 0.06545 0.06545
#   LambdaLR: 0.00625 0.10000 0.00625
#   OneCycleLR: 0.09083 0.00400 0.09083
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
venv/bin/python -W ignore - <<'PY'
import torch
from torch.optim import lr_scheduler as lr

SCHEDULERS = {
    "ExponentialLR": lambda optimizer: lr.ExponentialLR(optimizer, 0.5),
    "StepLR": lambda optimizer: lr.StepLR(optimizer, 2, 0.1),
    "CosineAnnealingLR": lambda optimizer: lr.CosineAnnealingLR(optimizer, 10),
    "LambdaLR": lambda optimizer: lr.LambdaLR(optimizer, lambda epoch: 0.5**epoch),
    "OneCycleLR": lambda optimizer: lr.OneCycleLR(optimizer, max_lr=0.1, total_steps=20),
}


def new_optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


wrong = []
for name, build in SCHEDULERS.items():
    optimizer = new_optimizer()
    scheduler = build(optimizer)
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    saved = optimizer.state_dict(), scheduler.state_dict()
    rate = optimizer.param_groups[0]["lr"]

    optimizer = new_optimizer()
    optimizer.load_state_dict(saved[0])
    scheduler = build(optimizer)
    scheduler.load_state_dict(saved[1])
    used, told = optimizer.param_groups[0]["lr"], scheduler.get_last_lr()[0]
    print(f"{name}: {rate:.5f} {used:.5f} {told:.5f}")
    assert told == rate, "the behaviour has changed"
    if used != rate:
        wrong.append(name)
assert ["LambdaLR", "OneCycleLR"] == wrong, f"the behaviour has changed: {wrong}"
PY
