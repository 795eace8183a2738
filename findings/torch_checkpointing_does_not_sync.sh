#!/usr/bin/env bash
# torch-checkpointing 0.1.1: the text of CheckpointManager.save says that its result can be awaited until the checkpoint is
# durable. A finished save has asked for no fsync, fdatasync or sync: after a power loss the checkpoint may be gone or
# empty. A save under an id that exists writes all bytes first, and refuses then.
# Seen:
#   saved: True, synced: []
#   again: FileExistsError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 torch-checkpointing==0.1.1
cd "$folder"
cat >shown.py <<'PY'
import os

import torch
import torch_checkpointing as tc
from torch_checkpointing.config import SyncCheckpointSaverConfig
from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig


def counted(name):
    real = getattr(os, name)
    return lambda *arguments: (synced.append(name), real(*arguments))


if __name__ == "__main__":
    synced = []
    for name in ("fsync", "fdatasync", "sync"):
        setattr(os, name, counted(name))
    state = {"w": torch.randn(1 << 20)}
    # Direct I/O, the default, is refused by some disks.
    storage = LocalFileSystemStorageConfig(use_direct_io=False)
    config = tc.CheckpointManager.Config(save=SyncCheckpointSaverConfig(), storage_config=storage)
    manager = tc.CheckpointManager(config)
    manager.save("one", {"state": state})
    print(f"saved: {os.path.isdir('one')}, synced: {synced}")
    try:
        manager.save("one", {"state": state})
        again = "accepted"
    except Exception as error:
        again = type(error).__name__
    print(f"again: {again}")
    assert ([], "FileExistsError") == (synced, again), "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
