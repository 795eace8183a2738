#!/usr/bin/env bash
# transformers 5.24.0: with eval_strategy="epoch" and save_strategy="steps" the Trainer saves the last step of an epoch before it
# evaluates that epoch. If the process dies within the evaluation, a resume from that checkpoint begins with the next epoch and
# does not run the evaluation. log_history lacks the epoch for ever; after the last epoch, train() returns at once without its
# metrics. One would expect the resumed training to log what the unbroken one logs.
# Seen (2 epochs of 5 steps, save_steps=5; the steps of the evaluations in log_history at the end):
#   without a kill: [5, 10]
#   killed in the evaluation of step 5, resumed: [10]
#   killed in the evaluation of step 10, resumed: [5]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0
cd "$folder"
cat >shown.py <<'PY'
import multiprocessing
import os
import signal

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

DATA = [{"x": torch.tensor([float(value)]), "labels": torch.ones(1)} for value in range(10)]


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, labels):
        return {"loss": (self.weight * x - labels).square().mean()}


class Kill(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_prediction_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def evaluated(folder, *, killed_at=None, resume=None):
    when = {"num_train_epochs": 2, "eval_strategy": "epoch", "save_strategy": "steps", "save_steps": 5}
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}
    args = TrainingArguments(folder, per_device_train_batch_size=2, prediction_loss_only=True, **when, **quiet)
    trainer = Trainer(Model(), args, train_dataset=DATA, eval_dataset=DATA, callbacks=[Kill(killed_at)])
    trainer.train(resume_from_checkpoint=resume)
    return [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]


if __name__ == "__main__":
    seen = {"without a kill": evaluated("whole")}
    for step in (5, 10):
        folder = f"killed_{step}"
        process = multiprocessing.get_context("spawn").Process(
            target=evaluated, args=(folder,), kwargs={"killed_at": step}
        )
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        seen[f"killed in the evaluation of step {step}, resumed"] = evaluated(folder, resume=f"{folder}/checkpoint-{step}")
    for what, steps in seen.items():
        print(f"{what}: {steps}")
    assert [[5, 10], [10], [5]] == list(seen.values()), "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
