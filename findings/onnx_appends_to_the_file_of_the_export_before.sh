#!/usr/bin/env bash
# onnx 1.23.2: save_model(..., save_as_external_data=True, location="weights.bin") refuses a weights.bin that exists, but it
# looks for the file in the working directory and not beside the model. In any other folder the second export is appended to the
# first one. A training that exports its best model to the same path keeps all earlier ones in that file, unseen by any
# reader, until the disk is full. And the model that was saved has lost its weights in memory.
# Seen:
#   in the working directory, the second export: FileExistsError
#   in a folder, weights.bin after 1, 2, 3 exports of one layer: [40000, 80000, 120000]
#   bytes of the weight in memory: 40000 before the save, 0 after it
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 onnx==1.23.2
cd "$folder"
cat >shown.py <<'PY'
import os

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def made():
    weight = numpy_helper.from_array(np.ones((100, 100), np.float32), "weight")
    inputs, outputs = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 100]) for name in ("x", "y"))
    node = helper.make_node("MatMul", ["x", "weight"], ["y"])
    return helper.make_model(helper.make_graph([node], "layer", [inputs], [outputs], [weight]))


def export(path):
    model = made()
    before = len(model.graph.initializer[0].raw_data)
    onnx.save_model(model, path, save_as_external_data=True, location="weights.bin")
    return before, len(model.graph.initializer[0].raw_data)


os.mkdir("out")
sizes = []
for _ in range(3):
    kept = export("out/model.onnx")
    sizes.append(os.path.getsize("out/weights.bin"))
export("model.onnx")
try:
    export("model.onnx")
    again = "taken"
except FileExistsError as error:
    again = type(error).__name__
print(f"in the working directory, the second export: {again}")
print(f"in a folder, weights.bin after 1, 2, 3 exports of one layer: {sizes}")
print(f"bytes of the weight in memory: {kept[0]} before the save, {kept[1]} after it")
assert (again, sizes, kept) == ("FileExistsError", [40000, 80000, 120000], (40000, 0)), "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
