#!/usr/bin/env bash
# keras 3.15.1 on torch: BackupAndRestore(save_freq=n) saves the weights, the epoch and the batch after each n batches. The restore never reads
# the batch: it begins the epoch again, with the weights that have already seen a part of it. So these batches are trained
# twice, and the step count of the optimizer, which schedules follow, is too high. save_freq="epoch" does not.
# Seen (3 epochs of 4 batches, stopped after batch 1 of epoch 1):
#   save_freq=2: the backup says {"epoch": 1, "batch": 1}, the resume begins at epoch 1, batch 0: 14 optimizer steps of 12
#   save_freq="epoch": the backup says {"epoch": 1, "batch": 0}, the resume begins at epoch 1, batch 0: 12 optimizer steps of 12
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 keras==3.15.1
cd "$folder"
cat >shown.py <<'PY'
import json
from pathlib import Path

import numpy as np
import keras


class Stopped(Exception):
    pass


class Batches(keras.callbacks.Callback):
    """Notes each batch, and stops after the given number of them."""

    def __init__(self, stop_after=None):
        super().__init__()
        self.seen, self.stop_after = [], stop_after

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append((self.epoch, batch))
        if len(self.seen) == self.stop_after:
            raise Stopped


def trained(batches, *callbacks):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(0.01), "mse")
    try:
        model.fit(np.ones((16, 4)), np.ones((16, 1)), batch_size=4, epochs=3, verbose=0, callbacks=[*callbacks, batches])
    except Stopped:
        pass
    return int(model.optimizer.iterations)


unbroken, found = trained(Batches()), []
for frequency in (2, "epoch"):
    folder = Path(f"backup-{frequency}")
    trained(Batches(stop_after=6), keras.callbacks.BackupAndRestore(folder, save_freq=frequency))
    said = json.loads((folder / "training_metadata.json").read_text())
    resumed = Batches()
    steps = trained(resumed, keras.callbacks.BackupAndRestore(folder, save_freq=frequency))
    (epoch, batch) = resumed.seen[0]
    print(
        f"save_freq={json.dumps(frequency)}: the backup says {json.dumps(said)}, the resume begins at epoch {epoch}, batch {batch}: "
        f"{steps} optimizer steps of {unbroken}"
    )
    found.append((said["batch"], epoch, batch, steps))
assert 12 == unbroken and [(1, 1, 0, 14), (0, 1, 0, 12)] == found, "the behaviour has changed"
PY
KERAS_BACKEND=torch venv/bin/python -W ignore shown.py
