#!/usr/bin/env bash
# transformers 5.24.0: the Trainer writes the state of EarlyStoppingCallback, its counter of evaluations without an
# improvement among it, into each checkpoint, and does not read it at a resume: the patience begins anew. With
# restore_callback_states_from_checkpoint=True the whole callback of the checkpoint replaces the one that the program has made, so
# another patience that the program gives at the resume is ignored.
# Seen, best at evaluation 2, patience 4:
#   unbroken: stops at step 6
#   resumed after step 4: stops at step 8
#   resumed with restore_callback_states_from_checkpoint=True: stops at step 6
#   the same with patience 8: stops at step 6
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0
cd "$folder"
cat >shown.py <<'PY'
import torch
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

SCORES = [0.5, 0.9] + [0.1] * 10


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def forward(self, inputs, labels):
        logits = self.layer(inputs)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


class Scripted(Trainer):
    """Measures the next value of the list."""

    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs)
        output.metrics["eval_score"] = SCORES[self.state.global_step - 1]
        return output


data = [{"inputs": torch.rand(2), "labels": number % 2} for number in range(16)]


def last_step(folder, steps, patience=4, resume=None, **options):
    arguments = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=1, save_strategy="steps", save_steps=1, eval_strategy="steps",
        eval_steps=1, metric_for_best_model="score", greater_is_better=True, load_best_model_at_end=True, report_to="none",
        use_cpu=True, disable_tqdm=True, **options,
    )
    callbacks = [EarlyStoppingCallback(patience)]
    trainer = Scripted(Model(), arguments, train_dataset=data, eval_dataset=data[:2], callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer.state.global_step


seen = [last_step("whole", 12)]
last_step("broken", 4)
names = ("resumed after step 4", "resumed with restore_callback_states_from_checkpoint=True", "the same with patience 8")
kinds = ({}, {"restore_callback_states_from_checkpoint": True})
for options, patience in ((kinds[0], 4), (kinds[1], 4), (kinds[1], 8)):
    seen.append(last_step("broken", 12, patience, "broken/checkpoint-4", **options))
for name, step in zip(("unbroken", *names), seen, strict=True):
    print(f"{name}: stops at step {step}")
assert [6, 8, 6, 6] == seen, "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py 2>/dev/null | grep "stops at step"
