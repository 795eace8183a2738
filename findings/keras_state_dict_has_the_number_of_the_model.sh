#!/usr/bin/env bash
# keras 3.15.1 on torch 2.13.0: state_dict() of a Keras model has the path of each variable, which begins with the automatic
# name of the model, such as sequential_1. The number counts the models of the process. So a program that builds another model
# first, for instance a baseline, cannot load what it saved before: all keys are others. A name= for the model and each layer
# makes the keys stable.
# Seen:
#   the last key: _torch_params.sequential/dense/kernel
#   the second model of the process takes the state of the first: False
#   with names: True
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


def model(name=None):
    layer = None if name is None else "dense"
    return keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, name=layer)], name=name)


def loads(one, other):
    try:
        other.load_state_dict(one.state_dict())
    except RuntimeError:
        return False
    return True


saved = model()
print("the last key:", list(saved.state_dict())[-1])
seen = [loads(saved, model()), loads(model("net"), model("net"))]
print("the second model of the process takes the state of the first:", seen[0])
print("with names:", seen[1])
assert [False, True] == seen, f"the behaviour has changed: {seen}"
PY
venv/bin/python -W ignore shown.py
