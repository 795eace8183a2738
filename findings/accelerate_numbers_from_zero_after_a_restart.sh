#!/usr/bin/env bash
# accelerate 1.15.0: with automatic_checkpoint_naming and total_limit, save_state numbers its folders from 0 in each process, and
# load_state does not change that. total_limit removes the folders with the lowest numbers, load_state() loads the highest. So
# after a restart each new checkpoint is the next to be removed, and the old one with the highest number is what the
# following restart loads. When its number is reached, save_state first removes the newest state and then raises.
# Seen:
#   first run: 3 steps, checkpoint_1 checkpoint_2
#   second run: resumed with step 3, saved step 4 and 5, then ValueError; left: checkpoint_2
#   third run: resumed with step 3
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 accelerate==1.15.0
cd "$folder"
cat >shown.py <<'PY'
import logging
import os

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

logging.disable()


def start():
    config = ProjectConfiguration(project_dir=".", automatic_checkpoint_naming=True, total_limit=2)
    accelerator = Accelerator(cpu=True, project_config=config)
    model = accelerator.prepare(torch.nn.Linear(1, 1, bias=False))
    torch.nn.init.zeros_(model.weight)
    if os.path.isdir("checkpoints"):
        accelerator.load_state()
    return accelerator, model


def train(accelerator, model, steps):
    saved = []
    for _ in range(steps):
        with torch.no_grad():
            model.weight += 1
        try:
            accelerator.save_state()
        except ValueError:
            return saved, "ValueError"
        saved.append(int(model.weight))
    return saved, "no error"


def there():
    return " ".join(sorted(os.listdir("checkpoints")))


train(*start(), 3)
print(f"first run: 3 steps, {there()}")
accelerator, model = start()
resumed = int(model.weight)
saved, error = train(accelerator, model, 3)
print(f"second run: resumed with step {resumed}, saved step {saved[0]} and {saved[1]}, then {error}; left: {there()}")
again = int(start()[1].weight)
print(f"third run: resumed with step {again}")
assert (3, [4, 5], "ValueError", "checkpoint_2", 3) == (resumed, saved, error, there(), again), "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
