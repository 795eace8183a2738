#!/usr/bin/env bash
# transformers 5.24.0: a resume from a checkpoint without optimizer.pt and scheduler.pt, as save_only_model=True writes them, is
# neither an error nor a warning. The step count goes on, and the optimizer and the learning rate begin anew: the schedule
# is at its top again in the middle of the training, and never comes to its end.
# Seen, learning rates of a linear schedule from 0.8 in 8 steps:
#   resumed after step 4 with an optimizer: 0.4 0.3 0.2 0.1
#   resumed after step 4 without one: 0.8 0.7 0.6 0.5
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0
cd "$folder"
cat >shown.py <<'PY'
import logging
import warnings

import torch
from transformers import Trainer, TrainingArguments
from transformers.utils import logging as transformers_logging


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def forward(self, inputs, labels):
        logits = self.layer(inputs)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


class Said(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())


said = []
transformers_logging.get_logger("transformers").addHandler(Said(logging.WARNING))
data = [{"inputs": torch.rand(2), "labels": number % 2} for number in range(16)]


def trained(folder, only_model, resume=None):
    arguments = TrainingArguments(
        folder, max_steps=8, per_device_train_batch_size=1, save_steps=4, save_only_model=only_model, logging_steps=1,
        learning_rate=0.8, report_to="none", use_cpu=True, disable_tqdm=True,
    )
    trainer = Trainer(Model(), arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return [round(entry["learning_rate"], 4) for entry in trainer.state.log_history if "learning_rate" in entry][4:]


seen = []
for folder, only_model, name in (("with", False, "with an optimizer"), ("without", True, "without one")):
    trained(folder, only_model)
    said.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen.append(trained(folder, only_model, f"{folder}/checkpoint-4"))
    about = [text for text in (*said, *(str(one.message) for one in caught)) if "optimizer" in text or "scheduler" in text]
    print(f"resumed after step 4 {name}:", *seen[-1])
assert [[0.4, 0.3, 0.2, 0.1], [0.8, 0.7, 0.6, 0.5]] == seen and not about, "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py | grep "^resumed"
