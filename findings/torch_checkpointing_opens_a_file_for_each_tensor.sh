#!/usr/bin/env bash
# torch-checkpointing 0.1.1 with torch 2.13.0: a background save sends each tensor to the writer process in shared memory,
# and torch keeps a file open for each of them. 1024 open files is the usual limit of a Linux login; a state of
# 2000 tensors, which a large model with its optimizer has, cannot be saved under it. A blocking save can.
# Seen:
#   blocking: saved
#   RuntimeError: unable to open shared memory object ... Too many open files (24)
#   in the background: too many open files
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 torch-checkpointing==0.1.1
cd "$folder"
cat >shown.py <<'PY'
import os
import resource

import torch
import torch_checkpointing as tc
from torch_checkpointing.config import AsyncCheckpointSaverConfig, SyncCheckpointSaverConfig
from torch_checkpointing.staging import CheckpointStagerConfig
from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

# This is what its documentation asks for on a machine without CUDA.
STAGING = {"use_pinned_memory": False, "use_async_staging": False, "use_non_blocking_copy": False}


def outcome(how):
    storage = LocalFileSystemStorageConfig(use_direct_io=False)
    manager = tc.CheckpointManager(tc.CheckpointManager.Config(save=how, storage_config=storage))
    try:
        future = manager.save(type(how).__name__, {"state": {f"w{i}": torch.ones(4) for i in range(2000)}})
        if future is not None:
            future.result(120)
        return "saved"
    except Exception as error:
        words = f"{type(error).__name__}: {error} {error.__cause__}"
        print(words[:300].replace("\n", " "), flush=True)
        return "too many open files" if "Too many open files" in words or "received 0 items" in words else words


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    blocking = outcome(SyncCheckpointSaverConfig())
    print("blocking:", blocking, flush=True)
    background = outcome(AsyncCheckpointSaverConfig(staging_config=CheckpointStagerConfig(**STAGING)))
    print("in the background:", background, flush=True)
    same = ("saved", "too many open files") == (blocking, background)
    os._exit(0 if same else 1)
PY
venv/bin/python -W ignore shown.py 2>stderr.txt || { tail -5 stderr.txt; echo "the behaviour has changed"; exit 1; }
