#!/usr/bin/env bash
# torch 2.13.0: CyclicLR.load_state_dict removes a key from the dictionary that it is given. The same state cannot be loaded
# twice, for example once to try it and once to go back, or into two schedulers; and a program that writes the loaded
# checkpoint to another file, as tools that strip or convert checkpoints do, writes one that no CyclicLR loads. Each other
# scheduler of torch takes the same dictionary again.
# Seen:
#   loaded twice: 14 of 15 schedulers; CyclicLR: KeyError('_scale_fn_custom')
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
cat >shown.py <<'PY'
import torch
from torch.optim import lr_scheduler as schedulers

optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
made = [
    schedulers.StepLR(optimizer, 3),
    schedulers.MultiStepLR(optimizer, [2, 7]),
    schedulers.ConstantLR(optimizer),
    schedulers.LinearLR(optimizer),
    schedulers.ExponentialLR(optimizer, 0.9),
    schedulers.PolynomialLR(optimizer),
    schedulers.CosineAnnealingLR(optimizer, 5),
    schedulers.CosineAnnealingWarmRestarts(optimizer, 3),
    schedulers.LambdaLR(optimizer, lambda epoch: 0.9),
    schedulers.MultiplicativeLR(optimizer, lambda epoch: 0.9),
    schedulers.ReduceLROnPlateau(optimizer),
    schedulers.ChainedScheduler([schedulers.ExponentialLR(optimizer, 0.9)]),
    schedulers.SequentialLR(optimizer, [schedulers.ExponentialLR(optimizer, 0.9), schedulers.ConstantLR(optimizer)], [4]),
    schedulers.OneCycleLR(optimizer, 0.2, total_steps=9),
    schedulers.CyclicLR(optimizer, 0.01, 0.1),
]
failed = {}
for scheduler in made:
    state = scheduler.state_dict()
    scheduler.load_state_dict(state)
    try:
        scheduler.load_state_dict(state)
    except KeyError as error:
        failed[type(scheduler).__name__] = repr(error)
print(f"loaded twice: {len(made) - len(failed)} of {len(made)} schedulers;", *(f"{k}: {v}" for k, v in failed.items()))
assert failed == {"CyclicLR": "KeyError('_scale_fn_custom')"}, "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
