#!/usr/bin/env bash
# keras 3.15.1: a .weights.h5 file has the weights of layers under their class and number, not under the names that the program
# gave. load_weights goes by these: in a model with the same layers in another order, each gets the weights of another one. A
# file of more layers than the model has is loaded without an error. One would expect names to count, or an error.
# Seen:
#   the layer 'encoder' has got the weights of: decoder
#   a file of three layers in a model of two: loaded
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 keras==3.15.1
cd "$folder"
cat >shown.py <<'PY'
import os

os.environ["KERAS_BACKEND"] = "torch"
import keras
import numpy as np


def model(names):
    return keras.Sequential([keras.Input((2,)), *[keras.layers.Dense(2, name=name) for name in names]])


saved = model(["encoder", "decoder"])
saved.save_weights("saved.weights.h5")
loaded = model(["decoder", "encoder"])
loaded.load_weights("saved.weights.h5")
kernels = {name: saved.get_layer(name).get_weights()[0] for name in ("encoder", "decoder")}
got = next(name for name, kernel in kernels.items() if np.array_equal(kernel, loaded.get_layer("encoder").get_weights()[0]))
model(["encoder", "decoder", "head"]).save_weights("three.weights.h5")
try:
    model(["encoder", "decoder"]).load_weights("three.weights.h5")
    fewer = "loaded"
except ValueError as error:
    fewer = str(error)
print("the layer 'encoder' has got the weights of:", got)
print("a file of three layers in a model of two:", fewer)
assert ["decoder", "loaded"] == [got, fewer], f"the behaviour has changed: {got}, {fewer}"
PY
venv/bin/python -W ignore shown.py
