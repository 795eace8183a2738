#!/usr/bin/env bash
# onnx 1.23.2: save_model(save_as_external_data=True) moves the weights out of the model in memory, into the file. A second save
# of the same model to another folder writes a graph without weights, and returns as if all were well: it refers to a file that
# only the first folder has. One would expect a save to leave the model as it is.
# Seen:
#   bytes of weights in memory before the save: 4000, after it: 0; the second file: ValidationError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 numpy==2.4.6
cd "$folder"
cat >shown.py <<'PY'
import pathlib

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

weights = numpy_helper.from_array(np.arange(1000, dtype="float32"), "w")
ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1000]) for name in "xy"]
model = helper.make_model(helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [weights]))
for name in ("best", "last"):
    pathlib.Path(name).mkdir()
before = len(model.graph.initializer[0].raw_data)
onnx.save_model(model, "best/model.onnx", save_as_external_data=True, location="model.data")
after = len(model.graph.initializer[0].raw_data)
onnx.save_model(model, "last/model.onnx")
try:
    onnx.load("last/model.onnx")
    second = "is read"
except onnx.checker.ValidationError as error:
    second = type(error).__name__
print(f"bytes of weights in memory before the save: {before}, after it: {after}; the second file: {second}")
assert [4000, 0, "ValidationError"] == [before, after, second], f"the behaviour has changed: {before}, {after}, {second}"
PY
venv/bin/python -W ignore shown.py
