#!/usr/bin/env bash
# accelerate 1.14.0: skip_first_batches gives a new loader, whose count of epochs begins at 0. When a program iterates over it,
# it calls set_epoch(0) on the old loader's sampler, which overrules the epoch that the program has set. So a resume in the
# middle of a later epoch goes on in the order of the first epoch: below, items 5 and 6 come twice in that epoch, 1 and 4 never.
# The Trainer of transformers 4.57.6 resumes so; the one of 5.24.0 sets the epoch of the new loader itself, and is exact.
# Releases 1.7.0 and 1.14.0 of accelerate behave so, 1.6.0 and 1.15.0 do not.
# Seen (10 items, batches of 2, shuffled):
#   epoch 1, all batches: [[5, 6], [1, 2], [0, 8], [9, 3], [7, 4]]
#   epoch 1, one batch skipped: [[7, 5], [3, 9], [0, 8], [6, 2]]
#   epoch 0, all batches: [[4, 1], [7, 5], [3, 9], [0, 8], [6, 2]]
#   Trainer, 10 steps at once: weight 0.1471
#   Trainer, resumed at step 6: weight 0.1479
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==4.57.6 accelerate==1.14.0
cd "$folder"
cat >shown.py <<'PY'
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments


def batches(epoch, *, skipped=0):
    set_seed(0)
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    loader = accelerator.prepare(DataLoader(range(10), batch_size=2, shuffle=True))
    loader.set_epoch(epoch)
    return [batch.tolist() for batch in (accelerator.skip_first_batches(loader, skipped) if skipped else loader)]


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return {"loss": (self.weight * x - 1).square().mean()}


def trained(folder, *, resume=None):
    when = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 6}
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}
    args = TrainingArguments(
        folder, per_device_train_batch_size=2, learning_rate=0.01, optim="sgd", max_grad_norm=0, **when, **quiet
    )
    model = Model()
    data = [{"x": torch.tensor([float(value)])} for value in range(10)]
    Trainer(model, args, train_dataset=data).train(resume_from_checkpoint=resume)
    return model.weight.item()


first, whole, skipped = batches(0), batches(1), batches(1, skipped=1)
print(f"epoch 1, all batches: {whole}")
print(f"epoch 1, one batch skipped: {skipped}")
print(f"epoch 0, all batches: {first}")
unbroken, resumed = trained("unbroken"), trained("resumed", resume="unbroken/checkpoint-6")
print(f"Trainer, 10 steps at once: weight {unbroken:.4f}")
print(f"Trainer, resumed at step 6: weight {resumed:.4f}")
assert first != whole, "the behaviour has changed"
assert first[1:] == skipped, "the behaviour has changed"
assert abs(unbroken - resumed) > 0.0005, "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
