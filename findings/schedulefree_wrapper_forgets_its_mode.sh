#!/usr/bin/env bash
# schedulefree 1.4.1: ScheduleFreeWrapper has the methods of an optimizer, state_dict among them. AdamWScheduleFree keeps in
# its state whether the model has the weights of training or the averaged ones; the wrapper's state is that of the wrapped
# optimizer alone. A program that saves in training, loads both states and calls train(), as before each step, gets other
# weights: train() takes those of training for the averaged ones and converts them once more. Nothing is raised.
# Seen:
#   AdamWScheduleFree: 0 between the resumed weights and those before the save
#   ScheduleFreeWrapper: 0.003 between the resumed weights and those before the save
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 schedulefree==1.4.1
cd "$folder"
cat >shown.py <<'PY'
import torch
from schedulefree import AdamWScheduleFree, ScheduleFreeWrapper


def make(kind):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    if kind is AdamWScheduleFree:
        return model, AdamWScheduleFree(model.parameters(), lr=0.1)
    return model, ScheduleFreeWrapper(torch.optim.SGD(model.parameters(), lr=0.1))


moved = []
for kind in (AdamWScheduleFree, ScheduleFreeWrapper):
    model, optimizer = make(kind)
    for _ in range(5):
        optimizer.train()
        optimizer.zero_grad()
        model(torch.ones(3, 4)).square().mean().backward()
        optimizer.step()
    resumed, resumed_optimizer = make(kind)
    resumed.load_state_dict(model.state_dict())
    resumed_optimizer.load_state_dict(optimizer.state_dict())
    resumed_optimizer.train()
    moved.append(round((model.weight - resumed.weight).abs().max().item(), 3))
    print(f"{kind.__name__}: {moved[-1]:g} between the resumed weights and those before the save")
assert moved[0] == 0 < moved[1], "the behaviour has changed"
PY
venv/bin/python shown.py
