#!/usr/bin/env bash
# safetensors 0.8.0: safetensors.numpy.save takes arrays of bfloat16 and of float8 (ml_dtypes, the types of JAX), and
# safetensors.numpy.load refuses the file with a bare KeyError. The file is right: safetensors.torch reads it. A program that
# saves with the one and resumes with the other learns of it at the resume.
# Seen:
#   bfloat16: safetensors.numpy.load: KeyError('BF16'); safetensors.torch.load: [1.5, 2.0]
#   float8_e4m3fn: safetensors.numpy.load: KeyError('F8_E4M3'); safetensors.torch.load: [1.5, 2.0]
#   float8_e5m2: safetensors.numpy.load: KeyError('F8_E5M2'); safetensors.torch.load: [1.5, 2.0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 safetensors==0.8.0 ml_dtypes==0.6.0
cd "$folder"
cat >shown.py <<'PY'
import ml_dtypes
import numpy as np
import safetensors.numpy
import safetensors.torch

seen = {}
for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
    data = safetensors.numpy.save({"w": np.array([1.5, 2.0], dtype=getattr(ml_dtypes, name))})
    try:
        read = safetensors.numpy.load(data)["w"].tolist()
    except KeyError as error:
        read = repr(error)
    seen[name] = read
    print(f"{name}: safetensors.numpy.load: {read}; safetensors.torch.load: {safetensors.torch.load(data)['w'].float().tolist()}")
expected = {"bfloat16": "KeyError('BF16')", "float8_e4m3fn": "KeyError('F8_E4M3')", "float8_e5m2": "KeyError('F8_E5M2')"}
assert expected == seen, f"the behaviour has changed: {seen}"
PY
venv/bin/python -W ignore shown.py
