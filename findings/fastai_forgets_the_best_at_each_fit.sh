#!/usr/bin/env bash
# fastai 2.8.12: SaveModelCallback forgets the best value at the start of each fit (reset_on_fit=True), and keeps its file name. fine_tune
# is two fits: the first epoch of the second one replaces the best model of the first one, though it is worse. The worse
# model is also what the learner holds at the end, because the callback loads its file then.
# Seen:
#   validation losses of the epochs: 0.1 | 0.9 0.8
#   best.pth holds the model of loss 0.8, and so does the learner
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 fastai==2.8.12
cd "$folder"
cat >shown.py <<'PY'
import torch
from fastai.callback.core import Callback
from fastai.callback.tracker import SaveModelCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.callback.schedule import *  # fine_tune

LOSSES = [0.1, 0.9, 0.8]


class Script(Callback):
    """Gives the weight, and so the validation loss, the next value of the list."""

    def before_validate(self):
        with torch.no_grad():
            self.learn.model[0].weight.fill_(remaining.pop(0))


remaining = list(LOSSES)
model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
data = DataLoader([(torch.ones(1), torch.zeros(1))] * 2, bs=2)
saver = SaveModelCallback(fname="best")
learn = Learner(
    DataLoaders(data, data), model, loss_func=lambda pred, target: pred.mean(), path=".", model_dir=".",
    splitter=lambda model: [list(model[0].parameters())], cbs=Script(),
)
with learn.no_bar(), learn.no_logging():
    learn.fine_tune(2, freeze_epochs=1, base_lr=1e-9, cbs=saver)
held = torch.load("best.pth")["0.weight"].item(), model[0].weight.item()
print(f"validation losses of the epochs: {LOSSES[0]} | {LOSSES[1]} {LOSSES[2]}")
print(f"best.pth holds the model of loss {held[0]:.1f}, and {'so does' if held[0] == held[1] else 'not'} the learner")
assert [round(value, 1) for value in held] == [0.8, 0.8], "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py 2>&1 | grep -v "^Better model"
