#!/usr/bin/env bash
# pytorch-ignite 0.5.5: Checkpoint removes the file that falls out of n_saved before it writes the new one. DiskSaver writes to a
# temporary name and moves it (atomic=True: "files are guaranteed to not be damaged"). But with n_saved=1 a save that
# fails, here because the disk takes no more, leaves no checkpoint at all: the old one is gone, the new one is not there.
# With n_saved=2 and a score it is the worse one that is gone, and one remains.
# Seen:
#   after epoch 1: model_1.pt; after the failed save of epoch 2: no checkpoint
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 pytorch-ignite==0.5.5
cd "$folder"
cat >shown.py <<'PY'
import logging
import resource
import signal
from pathlib import Path

import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver

logging.disable()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def saved():
    return ", ".join(path.name for path in Path("saved").glob("*.pt")) or "no checkpoint"


trainer = Engine(lambda engine, batch: None)
disk = DiskSaver("saved")
trainer.add_event_handler(Events.EPOCH_COMPLETED, Checkpoint({"model": torch.nn.Linear(9, 9)}, disk, n_saved=1))
trainer.run([0], max_epochs=1)
before = saved()
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))  # A disk that is full after 100 bytes.
try:
    trainer.run([0], max_epochs=2)
except OSError:
    pass
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(f"after epoch 1: {before}; after the failed save of epoch 2: {saved()}")
assert (before, saved()) == ("model_1.pt", "no checkpoint"), "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
