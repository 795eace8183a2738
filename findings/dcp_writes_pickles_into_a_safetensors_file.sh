#!/usr/bin/env bash
# torch 2.13.0, safetensors 0.8.0: HuggingFaceStorageWriter of torch.distributed.checkpoint writes model-00001-of-00001.safetensors.
# If the state has one value that is not a tensor, such as the step, dcp.save raises no error, and the file begins with the bytes
# of a torch file instead of a safetensors header. Neither safetensors nor HuggingFaceStorageReader opens it.
# Seen:
#   tensors alone: begins with a safetensors header, safe_open reads ['weight']
#   with a step: begins with b'PK\x03\x04', safe_open: SafetensorError: Error while deserializing header: header too large
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 safetensors==0.8.0
cd "$folder"
cat >shown.py <<'PY'
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open

seen = []
for name, state in {"tensors alone": {}, "with a step": {"step": 3}}.items():
    writer = dcp.HuggingFaceStorageWriter(name)
    dcp.save({"weight": torch.ones(2), **state}, storage_writer=writer, no_dist=True)
    (file,) = Path(name).glob("*.safetensors")
    begin = file.read_bytes()[:4]
    try:
        with safe_open(file, framework="pt") as opened:
            result = f" reads {list(opened.keys())}"
    except SafetensorError as error:
        result = f": {type(error).__name__}: {error}"
    seen.append(begin == b"PK\x03\x04")
    print(f"{name}: begins with {begin if seen[-1] else 'a safetensors header'}, safe_open{result}")
assert seen == [False, True], "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
