#!/usr/bin/env bash
# transformers 5.24.0: save_total_limit removes the checkpoints whose folders were modified longest ago, not those of the lowest steps.
# A file that is added to an old checkpoint (a note, a converted file, a model card) makes that folder the newest. Then the
# Trainer keeps it and removes a later step. A copy that does not keep the times has the same effect.
# Seen:
#   checkpoint-1 got a note; after step 3 with save_total_limit=2: checkpoint-1 checkpoint-3
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0
cd "$folder"
cat >shown.py <<'PY'
import os
import time
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

logging.set_verbosity_error()


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, x, labels=None):
        return {"loss": self.layer(x).sum()}


def train(steps, **resume):
    args = TrainingArguments(
        "out", max_steps=steps, save_steps=1, save_total_limit=2, per_device_train_batch_size=1, report_to=[],
        use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )
    trainer = Trainer(Net(), args, train_dataset=[{"x": torch.ones(1)}] * 4)
    trainer.log = lambda *_, **__: None
    trainer.train(**resume)


train(2)
time.sleep(1.5)  # Within one second the numbers decide.
Path("out/checkpoint-1/note.txt").write_text("these weights are published\n")
time.sleep(1.5)
train(3, resume_from_checkpoint=True)
left = " ".join(sorted(os.listdir("out")))
print(f"checkpoint-1 got a note; after step 3 with save_total_limit=2: {left}")
assert left == "checkpoint-1 checkpoint-3", "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
