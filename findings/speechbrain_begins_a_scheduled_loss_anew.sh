#!/usr/bin/env bash
# speechbrain 1.1.2: ScheduledLoss trains with one loss for some steps, and with another one after that. It has methods that save and load its count
# of steps, but its class is not registered as the other schedulers are. It is a module, so a Checkpointer saves its state_dict(), which is
# empty. A resumed training has the first loss again, for as many steps. No warning. InverseSquareRootScheduler is registered
# and has no method that loads, so what it saves is never read: a resume ends with an error.
# Seen (3 steps of L1, then MSE, of a difference of 2; saved after step 4):
#   unbroken: 2.0 2.0 2.0 4.0 4.0 4.0
#   resumed:  2.0 2.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 speechbrain==1.1.2
cd "$folder"
cat >shown.py <<'PY'
import logging
import sys
import types

sys.modules["torchaudio"] = types.ModuleType("torchaudio")  # It is imported, and not used here.
sys.modules["torchaudio"].__version__ = "2.11.0"
logging.disable()

import torch
from speechbrain.nnet.schedulers import InverseSquareRootScheduler, ScheduledLoss
from speechbrain.utils.checkpoints import Checkpointer
from torch.nn.functional import l1_loss, mse_loss


def made():
    return ScheduledLoss([{"loss_fn": l1_loss, "steps": 3}, {"loss_fn": mse_loss}])


def losses(loss, steps):
    return [loss(torch.tensor([2.0]), torch.tensor([0.0])).item() for _ in range(steps)]


unbroken = losses(made(), 6)
print("unbroken:", *unbroken)
first, second = made(), made()
losses(first, 4)
Checkpointer("saved", {"loss": first}).save_checkpoint()
assert Checkpointer("saved", {"loss": second}).recover_if_possible() is not None
resumed = losses(second, 2)
print("resumed: ", *resumed)
assert resumed != unbroken[4:], "the behaviour has changed"
saver = Checkpointer("other", {"rate": InverseSquareRootScheduler(10)})
saver.save_checkpoint()
try:
    saver.recover_if_possible()
except RuntimeError as error:
    assert "Don't know how to load" in str(error), "the behaviour has changed"
else:
    raise AssertionError("the behaviour has changed")
PY
venv/bin/python -W ignore shown.py
