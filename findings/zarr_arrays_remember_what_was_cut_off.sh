#!/usr/bin/env bash
# zarr 3.1.6: resize() to a smaller shape removes whole chunks, and leaves the chunk of the new end as it is. If the array is
# extended again, the old values within that chunk come back, and beyond it is the fill value. A resume that cuts a log of the
# training back to its step and extends it finds values of the steps that it has abandoned. One would expect the fill value
# everywhere.
# Seen:
#   cut to 2 and extended to 8: [0.0, 1.0, 2.0, 3.0, nan, nan, nan, nan]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet zarr==3.1.6 numpy==2.4.6
cd "$folder"
cat >shown.py <<'PY'
import numpy as np
import zarr

log = zarr.create_array("log.zarr", shape=(8,), chunks=(4,), dtype="f4", fill_value=np.nan)
log[:] = np.arange(8)
log.resize((2,))  # The training goes back to step 2.
log.resize((8,))
seen = zarr.open_array("log.zarr")[:].tolist()
print("cut to 2 and extended to 8:", seen)
assert [0.0, 1.0, 2.0, 3.0] == seen[:4] and all(value != value for value in seen[4:]), f"the behaviour has changed: {seen}"
PY
venv/bin/python -W ignore shown.py
