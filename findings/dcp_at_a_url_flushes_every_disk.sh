#!/usr/bin/env bash
# torch 2.13.0: torch.distributed.checkpoint's FsspecWriter asks for a sync of each file it writes, by default. The stream of
# an object store has no file descriptor, and then the writer calls os.sync(): each file of a checkpoint that goes to a
# bucket flushes every local disk of the machine, also what other jobs have written there. It does nothing for the bucket.
#
# Seen:
#   calls of os.sync() for a checkpoint in memory: 2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 fsspec==2026.9.0
cd "$folder"
cat >shown.py <<'PY'
import os

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

calls = []
os.sync = lambda: calls.append("sync")
dcp.save({"w": torch.ones(2)}, storage_writer=FsspecWriter("memory://saved"), no_dist=True)
print(f"calls of os.sync() for a checkpoint in memory: {len(calls)}")
assert calls, "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
