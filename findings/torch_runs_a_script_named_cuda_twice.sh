#!/usr/bin/env bash
# torch 2.13.0: `import torch` tries to import NVIDIA's package `cuda`. A script or module of that name, as in
# benchmarks/cuda.py, lies first on the path, so torch imports it: the script runs a second time, in the middle of the
# import of torch, and whatever it asks of torch there fails. On a machine without a GPU too.
# Seen:
#   the script began with torch: not imported
#   the script began with torch: half imported
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
cat >cuda.py <<'PY'
import sys

torch = sys.modules.get("torch")
print("the script began with torch:", "not imported" if torch is None else "half imported")
import torch
PY
venv/bin/python -W ignore cuda.py | tee seen.txt
[[ $(wc -l <seen.txt) == 2 ]] || { echo "the behaviour has changed"; exit 1; }
