#!/usr/bin/env bash
# lightning 2.6.6: a fit that is resumed within an epoch does not call on_train_epoch_start for that epoch, and what its callbacks
# set there is not set. GradientAccumulationScheduler is one: the rest of the epoch is trained without accumulation, so the
# optimizer steps three times as often as in an unbroken training, with a third of the batch.
# Seen, accumulation of 3 from epoch 0 on, 6 batches an epoch, 1 epoch:
#   unbroken: 2 steps of the optimizer
#   resumed after batch 3: 1 step before, 3 steps after
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 lightning==2.6.6
cd "$folder"
cat >shown.py <<'PY'
import logging

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch.utils.data import DataLoader

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Task(LightningModule):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(2, 2)

    def training_step(self, batch, _):
        return self.head(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), 0.01)


def steps(resume=None):
    saves = ModelCheckpoint("out", "{step}", save_top_k=-1, every_n_train_steps=1, enable_version_counter=False)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[GradientAccumulationScheduler({0: 3}), saves],
    )
    trainer.fit(Task(), DataLoader(torch.ones(6, 2), 1), ckpt_path=resume, weights_only=False)
    return trainer.global_step


whole, resumed = steps(), steps("out/step=1.ckpt")
print(f"unbroken: {whole} steps of the optimizer")
print(f"resumed after batch 3: 1 step before, {resumed - 1} steps after")
assert (2, 4) == (whole, resumed), "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py 2>/dev/null
