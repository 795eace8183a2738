#!/usr/bin/env bash
# sample-factory 2.1.1: the learner writes to the temporary name checkpoint_temp and renames it, so that a failed save damages nothing.
# A restart loads the last one in the order of names of "checkpoint_*", and that is the temporary file, which is damaged if the disk
# was full or the process was killed. It tries this file three times, and then trains from the beginning. keep_checkpoints counts the
# old files with the new ones and removes the lowest steps: what the new training saves is removed at once.
# Seen (keep_checkpoints=2):
#   saved: checkpoint_000000002_20.pth checkpoint_000000003_30.pth
#   after a failed save of step 4: checkpoint_000000002_20.pth checkpoint_000000003_30.pth checkpoint_temp
#   a restart begins at step 0
#   its save at step 1 leaves: checkpoint_000000002_20.pth checkpoint_000000003_30.pth
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# sample-factory asks for an older numpy, which nothing here needs.
"$folder/venv/bin/pip" install --quiet --no-deps sample-factory==2.1.1
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 gymnasium==1.4.0 colorlog==6.12.0 faster-fifo==1.5.2 huggingface-hub==2.4.0 \
    opencv-python-headless==5.0.0.93 psutil==7.2.2 pyglet==2.1.19 signal-slot-mp==1.0.5 tensorboardx==2.6.5 threadpoolctl==3.8.0 wandb==0.31.0 2>&1 | grep -v incompatible || true
cd "$folder"
cat >shown.py <<'PY'
import resource
import signal
from pathlib import Path
from types import SimpleNamespace

import torch
from sample_factory.algo.learning.learner import Learner
from sample_factory.utils.utils import log

log.setLevel(100)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
CFG = SimpleNamespace(
    train_dir=".", experiment="run", keep_checkpoints=2, load_checkpoint_kind="latest", learning_rate=0.1
)


class Small(Learner):
    """A learner with a tiny model, and without its processes."""

    def __init__(self):
        self.cfg, self.policy_id, self.device, self.is_initialized = CFG, 0, "cpu", True
        self.train_step = self.env_steps = 0
        self.best_performance, self.curr_lr = -1e9, 0.1
        self.actor_critic = torch.nn.Linear(99, 99)
        self.optimizer = torch.optim.SGD(self.actor_critic.parameters(), lr=0.1)

    def save_at(self, step):
        self.train_step, self.env_steps = step, 10 * step
        self.save()


def files():
    return " ".join(sorted(path.name for path in Path("run/checkpoint_p0").iterdir()))


Path("run").mkdir()
learner = Small()
for step in (1, 2, 3):
    learner.save_at(step)
before = files()
print("saved:", before)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))  # A disk that is full after 20 kB.
try:
    learner.save_at(4)
except (OSError, RuntimeError):
    pass
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print("after a failed save of step 4:", files())
learner = Small()
learner.load_from_checkpoint(0)
step = learner.train_step
print("a restart begins at step", step)
learner.save_at(1)
print("its save at step 1 leaves:", files())
assert step == 0 and files() == before, "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py 2>&1 | grep "^saved\|^after\|^a restart\|^its save\|Error"
