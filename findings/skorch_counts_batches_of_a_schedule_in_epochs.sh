#!/usr/bin/env bash
# skorch 1.4.0: Checkpoint and LoadInitState save and restore the module, the optimizer and the history, but no scheduler. LRScheduler
# makes a new one when the training begins, and starts it at the number of epochs in the history. With step_every="batch" this number
# is far too low: a resumed OneCycleLR begins its cycle again. With step_every="epoch" ExponentialLR and CosineAnnealingLR have the rate
# of the epoch before once more, and stay one epoch behind with each resume; LambdaLR and StepLR are exact. No warning.
# Seen (8 epochs of 4 batches, rates at the ends of the epochs):
#   OneCycleLR, each batch, unbroken:    0.285 0.896 0.980 0.838 0.598 0.330 0.111 0.005
#   resumed after 4 epochs:              0.285 0.896 0.980 0.838 0.896 0.980 0.838 0.598
#   ExponentialLR, each epoch, unbroken: 1.000 0.500 0.250 0.125 0.062 0.031 0.016 0.008
#   resumed after 4 epochs:              1.000 0.500 0.250 0.125 0.125 0.062 0.031 0.016
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 skorch==1.4.0
cd "$folder"
cat >shown.py <<'PY'
import numpy
import torch
from skorch import NeuralNetRegressor
from skorch.callbacks import Callback, Checkpoint, LoadInitState, LRScheduler
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR

X = numpy.random.RandomState(0).randn(40, 2).astype("float32")


class Rates(Callback):
    """Notes the rate of the last batch of each epoch."""

    def __init__(self, seen):
        self.seen = seen

    def on_epoch_begin(self, net, **kwargs):
        self.seen.append(None)

    def on_batch_begin(self, net, training=None, **kwargs):
        self.seen[-1] = net.optimizer_.param_groups[0]["lr"]


def fit(folder, epochs, **schedule):
    saver, seen = Checkpoint(dirname=folder, monitor=None), []
    NeuralNetRegressor(
        torch.nn.Linear,
        module__in_features=2,
        module__out_features=1,
        max_epochs=epochs,
        lr=1.0,
        batch_size=10,
        train_split=None,
        verbose=0,
        callbacks=[saver, LoadInitState(saver), ("lr", LRScheduler(**schedule)), Rates(seen)],
    ).fit(X, X.sum(1, keepdims=True))
    return seen


def show(text, rates):
    rates = [f"{rate:.3f}" for rate in rates]
    print(text, *rates)
    return rates


cycle = {"policy": OneCycleLR, "max_lr": 1.0, "total_steps": 33, "step_every": "batch"}
unbroken = show("OneCycleLR, each batch, unbroken:   ", fit("a", 8, **cycle))
resumed = show("resumed after 4 epochs:             ", fit("b", 4, **cycle) + fit("b", 4, **cycle))
assert resumed[4:] == unbroken[1:5], "the behaviour has changed"

decay = {"policy": ExponentialLR, "gamma": 0.5}
unbroken = show("ExponentialLR, each epoch, unbroken:", fit("c", 8, **decay))
resumed = show("resumed after 4 epochs:             ", fit("d", 4, **decay) + fit("d", 4, **decay))
assert resumed[4:] == unbroken[3:7], "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
