#!/usr/bin/env bash
# torchtnt 0.2.4: the metric of a checkpoint is in the name of its folder, as Python prints the number, and a restart reads it from
# there. The pattern that reads it has no exponent. A metric below 0.0001 is printed with one, so no restart finds the folder: the
# best checkpoint is not the one that restore_from_best takes, and restore_from_latest goes back to an older one. No error.
# Seen:
#   saved: epoch_1_train_step_2_loss=0.5 epoch_2_train_step_4_loss=0.2 epoch_3_train_step_6_loss=5e-05
#   restore_from_best: epoch 2
#   restore_from_latest: epoch 2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 torchtnt==0.2.4
PIP_CONSTRAINT= "$folder/venv/bin/pip" install --quiet setuptools==80.9.0 # A later one has no pkg_resources, which torchtnt imports.
cd "$folder"
cat >shown.py <<'PY'
import logging
import os

import torch
from torchtnt.framework.callbacks.dcp_saver import DistributedCheckpointSaver
from torchtnt.framework.train import train
from torchtnt.framework.unit import TrainUnit
from torchtnt.utils.checkpoint import BestCheckpointConfig

logging.disable()
LOSSES = [0.5, 0.2, 0.00005]


class Unit(TrainUnit):
    def __init__(self):
        super().__init__()
        self.module = torch.nn.Linear(1, 1)
        self.loss = None

    def train_step(self, state, data):
        self.loss = LOSSES[self.train_progress.num_epochs_completed]


best = BestCheckpointConfig(monitored_metric="loss", mode="min")
saver = DistributedCheckpointSaver("saved", save_every_n_epochs=1, best_checkpoint_config=best)
train(Unit(), [0, 1], max_epochs=3, callbacks=[saver])
print("saved:", *sorted(os.listdir("saved")))
by_best, by_latest = Unit(), Unit()
DistributedCheckpointSaver.restore_from_best("saved", by_best, metric_name="loss", mode="min")
DistributedCheckpointSaver.restore_from_latest("saved", by_latest)
epochs = by_best.train_progress.num_epochs_completed, by_latest.train_progress.num_epochs_completed
print(f"restore_from_best: epoch {epochs[0]}\nrestore_from_latest: epoch {epochs[1]}")
assert (2, 2) == epochs, "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
