#!/usr/bin/env bash
# torch 2.13.0: load_state_dict of a scheduler overwrites what the program has just given to its constructor. A finished training
# of 10 steps that is continued to 20, with schedulers built for 20, goes on by the schedules of 10: LinearLR and PolynomialLR
# keep a learning rate of 0 for all new steps, so nothing is trained; CosineAnnealingLR climbs back to the full rate. LambdaLR,
# which the schedules of transformers are made of, does follow the new length. Only OneCycleLR raises an error.
# Seen:
#   LinearLR: built for 20 steps: 0.045 ... 0.005 0.0; resumed: 0.0 ... 0.0 0.0
#   PolynomialLR: built for 20 steps: 0.045 ... 0.005 0.0; resumed: 0.0 ... 0.0 0.0
#   CosineAnnealingLR: built for 20 steps: 0.0422 ... 0.0006 0.0; resumed: 0.0024 ... 0.0976 0.1
#   LambdaLR: built for 20 steps: 0.045 ... 0.005 0.0; resumed: 0.045 ... 0.005 0.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
cat >shown.py <<'PY'
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, PolynomialLR

KINDS = {
    LinearLR: lambda optimizer, steps: LinearLR(optimizer, 1.0, 0.0, steps),
    PolynomialLR: PolynomialLR,
    CosineAnnealingLR: CosineAnnealingLR,
    LambdaLR: lambda optimizer, steps: LambdaLR(optimizer, lambda step: 1 - step / steps),
}


def new(make, steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    return optimizer, make(optimizer, steps)


def rates(optimizer, scheduler, steps):
    seen = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        seen.append(round(optimizer.param_groups[0]["lr"], 4))
    return seen


same = []
for kind, make in KINDS.items():
    whole = rates(*new(make, 20), 20)[10:]
    first = new(make, 10)
    rates(*first, 10)
    resumed = new(make, 20)
    for here, there in zip(resumed, first, strict=True):
        here.load_state_dict(there.state_dict())
    seen = rates(*resumed, 10)
    print(f"{kind.__name__}: built for 20 steps:", whole[0], "...", *whole[-2:], end="; resumed: ")
    print(seen[0], "...", *seen[-2:])
    same.append(seen == whole)
assert [False, False, False, True] == same, "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
