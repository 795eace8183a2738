#!/usr/bin/env bash
# timm 1.0.31: PlateauLRScheduler holds a ReduceLROnPlateau of torch, and its state_dict() has two values of it: the best metric
# and the last epoch. The number of bad epochs and the cooldown begin again at each resume. A training that is preempted more
# often than its patience never lowers its rate. The state of torch's own scheduler has all of them.
# Seen:
#   state: ['best', 'last_epoch']
#   rates of 6 bad epochs, patience 2: 1.0 1.0 1.0 0.1 0.1 0.1
#   resumed after each second epoch:   1.0 1.0 1.0 1.0 1.0 1.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 timm==1.0.31 torchvision==0.28.0
cd "$folder"
cat >shown.py <<'PY'
import contextlib

import torch

for name in ("nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"):
    for operator in (name, f"_{name}_backward"):
        with contextlib.suppress(RuntimeError):  # torchvision is of another build than torch, and nothing here runs it.
            torch.library.define(f"torchvision::{operator}", "(Tensor x) -> Tensor")

from timm.scheduler import PlateauLRScheduler


def made():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    return optimizer, PlateauLRScheduler(optimizer, patience_t=2, decay_rate=0.1)


def rates(every):
    optimizer, scheduler = made()
    seen = []
    for epoch in range(6):
        scheduler.step(epoch + 1, 1.0)
        seen.append(round(optimizer.param_groups[0]["lr"], 6))
        if every and epoch % every == every - 1:
            states = optimizer.state_dict(), scheduler.state_dict()
            optimizer, scheduler = made()
            optimizer.load_state_dict(states[0])
            scheduler.load_state_dict(states[1])
    return seen


print("state:", list(made()[1].state_dict()))
unbroken, resumed = rates(None), rates(2)
print("rates of 6 bad epochs, patience 2:", *unbroken)
print("resumed after each second epoch:  ", *resumed)
assert unbroken[3] == 0.1 and resumed == [1.0] * 6, "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
