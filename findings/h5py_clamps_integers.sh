#!/usr/bin/env bash
# h5py 3.16.0: integers that the type of a dataset cannot hold are clamped to its bounds, without an error: -1 becomes 0 in
# unsigned bytes, and 300 becomes 127 in int8. numpy and torch wrap around (-1 is 255, 300 is 44), so the same assignment gives
# other numbers in memory and in the file. -1 is the label that losses ignore; in the file it is class 0.
# Seen:
#   uint8: in the file [0, 5, 255], in numpy [255, 5, 44]
#   int8: in the file [-1, 5, 127], in numpy [-1, 5, 44]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet h5py==3.16.0 numpy==2.4.6
cd "$folder"
cat >shown.py <<'PY'
import h5py
import numpy as np

values = np.array([-1, 5, 300])
seen = {}
with h5py.File("labels.h5", "w") as file:
    for dtype in ("uint8", "int8"):
        dataset = file.create_dataset(dtype, (3,), dtype=dtype)
        dataset[:] = values
        seen[dtype] = [dataset[:].tolist(), values.astype(dtype).tolist()]
        print(f"{dtype}: in the file {seen[dtype][0]}, in numpy {seen[dtype][1]}")
assert {"uint8": [[0, 5, 255], [255, 5, 44]], "int8": [[-1, 5, 127], [-1, 5, 44]]} == seen, f"the behaviour has changed: {seen}"
PY
venv/bin/python -W ignore shown.py
