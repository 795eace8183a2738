#!/usr/bin/env bash
# safetensors 0.8.0: its two readers for torch know different types. load_file reads a file of float8_e8m0 or float4, and
# load fails with a KeyError on the very bytes of that file. Code that reads from an object store (bytes) and is tested on
# a disk (files) breaks on block-scaled weights alone.
# Seen:
#   load_file: torch.float8_e8m0fnu
#   load: KeyError: 'F8_E8M0'
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 safetensors==0.8.0
cd "$folder"
cat >shown.py <<'PY'
import torch
from safetensors.torch import load, load_file, save_file

save_file({"scale": torch.ones(2).to(torch.float8_e8m0fnu)}, "scale.safetensors")
dtype = load_file("scale.safetensors")["scale"].dtype
print(f"load_file: {dtype}")
try:
    with open("scale.safetensors", "rb") as stream:
        load(stream.read())
    failure = "none"
except KeyError as error:
    failure = f"KeyError: {error}"
print(f"load: {failure}")
assert dtype == torch.float8_e8m0fnu, "the behaviour has changed"
assert failure == "KeyError: 'F8_E8M0'", f"the behaviour has changed: {failure}"
PY
venv/bin/python -W ignore shown.py
