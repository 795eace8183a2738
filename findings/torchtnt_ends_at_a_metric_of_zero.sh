#!/usr/bin/env bash
# torchtnt 0.2.4: a monitored metric of 0 counts as no metric, as the documentation says of a metric that is None. So a checkpoint
# with an accuracy of 0 is saved without it, and is neither counted nor removed. If there are keep_last_n_checkpoints other ones
# already, the training ends with an AssertionError after such an epoch.
# Seen (keep_last_n_checkpoints=1):
#   accuracies 0.0, 0.3, 0.5: kept epoch_1_train_step_1 epoch_3_train_step_3_accuracy=0.5
#   accuracies 0.3, 0.0, 0.5: AssertionError after epoch 2
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


class Unit(TrainUnit):
    def __init__(self, accuracies):
        super().__init__()
        self.module = torch.nn.Linear(1, 1)
        self.accuracies = accuracies

    def train_step(self, state, data):
        self.accuracy = self.accuracies[self.train_progress.num_epochs_completed]


def trained(folder, accuracies):
    best = BestCheckpointConfig(monitored_metric="accuracy", mode="max")
    saver = DistributedCheckpointSaver(
        folder, save_every_n_epochs=1, keep_last_n_checkpoints=1, best_checkpoint_config=best
    )
    unit = Unit(accuracies)
    try:
        train(unit, [0], max_epochs=3, callbacks=[saver])
        outcome = "kept " + " ".join(sorted(os.listdir(folder)))
    except AssertionError as error:
        outcome = f"{type(error).__name__} after epoch {unit.train_progress.num_epochs_completed}"
    print("accuracies", ", ".join(map(str, accuracies)) + ":", outcome)
    return outcome


kept = trained("first", [0.0, 0.3, 0.5])
assert "kept epoch_1_train_step_1 epoch_3_train_step_3_accuracy=0.5" == kept, "the behaviour has changed"
assert "AssertionError after epoch 2" == trained("second", [0.3, 0.0, 0.5]), "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
