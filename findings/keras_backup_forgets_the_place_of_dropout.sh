#!/usr/bin/env bash
# keras 3.15.1 on torch: a layer that draws random numbers, such as Dropout, has a SeedGenerator, whose state is the seed and a counter.
# The state is among model.variables, but not in a .weights.h5 file, which BackupAndRestore writes. So a resumed training sets
# the counter to 0 and draws the masks of the first epochs again. It says nothing. state_dict() of the same model has the state.
# Seen (4 batches in each epoch, Dropout(seed=5), stopped at the start of epoch 2):
#   the state [seed, counter] at the backup: [5, 8]; after the restore: [5, 0]
#   the mask of the first resumed batch is that of: batch 0 of epoch 0
#   the resumed training ends with other weights than the unbroken one: True; without the Dropout: False
#   the state is in state_dict(): True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 keras==3.15.1
cd "$folder"
cat >shown.py <<'PY'
import numpy as np
import keras

INPUTS = np.random.RandomState(0).rand(16, 4).astype("float32")
TARGETS = INPUTS.sum(1, keepdims=True)
SETTINGS = {"batch_size": 4, "epochs": 4, "verbose": 0, "shuffle": False}


class Stopped(Exception):
    pass


class Masked(keras.layers.Dropout):
    """Remembers its masks."""

    def call(self, inputs, training=False):
        outputs = super().call(inputs, training=training)
        if training:
            masks.append(tuple((super().call(keras.ops.ones_like(inputs), training=False) * (outputs != 0)).flatten().tolist()))
        return outputs


class AtEpoch(keras.callbacks.Callback):
    def __init__(self, do):
        super().__init__()
        self.do = do

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            self.do(self.model)


def made(dropout):
    keras.utils.set_random_seed(0)
    layers = [keras.Input((4,)), keras.layers.Dense(32)] + [Masked(0.5, seed=5)] * dropout + [keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    return model


def note(model):
    states.append([variable.numpy().tolist() for variable in model.variables if "seed" in variable.path][:1])


def stop(model):
    note(model)
    raise Stopped


def trained(dropout, *callbacks):
    masks.clear()
    model = made(dropout)
    try:
        model.fit(INPUTS, TARGETS, callbacks=list(callbacks), **SETTINGS)
    except Stopped:
        pass
    return model.get_weights(), list(masks)


masks, states, differs = [], [], []
for dropout in (True, False):
    unbroken, all_masks = trained(dropout)
    trained(dropout, keras.callbacks.BackupAndRestore("backup"), AtEpoch(stop))
    resumed, new_masks = trained(dropout, keras.callbacks.BackupAndRestore("backup"), AtEpoch(note))
    differs.append(not all(np.array_equal(one, other) for one, other in zip(unbroken, resumed, strict=True)))
    if dropout:
        first = all_masks.index(new_masks[0])
(at,), (after,) = states[:2]
print(f"the state [seed, counter] at the backup: {at}; after the restore: {after}")
print(f"the mask of the first resumed batch is that of: batch {first % 4} of epoch {first // 4}")
print(f"the resumed training ends with other weights than the unbroken one: {differs[0]}; without the Dropout: {differs[1]}")
held = any("seed_generator_state" in name for name in made(True).state_dict())
print(f"the state is in state_dict(): {held}")
assert ([5, 8], [5, 0], 0, [True, False], True) == (at, after, first, differs, held), "the behaviour has changed"
PY
KERAS_BACKEND=torch venv/bin/python -W ignore shown.py
