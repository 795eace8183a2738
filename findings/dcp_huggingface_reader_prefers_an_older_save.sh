#!/usr/bin/env bash
# torch 2.13.0, safetensors 0.8.0: HuggingFaceStorageWriter names its files by their number. A save into a folder that has a
# save of another number of files leaves the old files, and HuggingFaceStorageReader reads all files of the folder: if a tensor
# is in two, it takes one by the order of their names. So a load right after a save gives the older weights, without an error.
# FileSystemWriter replaces what the folder holds.
# Seen:
#   files: model-00001-of-00001.safetensors model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.safetensors.index.json
#   saved 1.0 in two files, then 9.0 in one; loaded: {'a': 1.0, 'b': 1.0}
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 safetensors==0.8.0
cd "$folder"
cat >shown.py <<'PY'
import os

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter


def save(value, files):
    state = {name: torch.full((1,), value) for name in "ab"}
    dcp.save(state, storage_writer=HuggingFaceStorageWriter("run", fqn_to_index_mapping=files), no_dist=True)


save(1.0, {"a": 1, "b": 2})
save(9.0, {"a": 1, "b": 1})
state = {name: torch.zeros(1) for name in "ab"}
dcp.load(state, storage_reader=HuggingFaceStorageReader("run"), no_dist=True)
seen = {name: tensor.item() for name, tensor in state.items()}
print("files:", *sorted(os.listdir("run")))
print("saved 1.0 in two files, then 9.0 in one; loaded:", seen)
assert {"a": 1.0, "b": 1.0} == seen, f"the behaviour has changed: {seen}"
PY
venv/bin/python -W ignore shown.py
