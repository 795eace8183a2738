#!/usr/bin/env bash
# poutyne 1.19.0: an Experiment saves the optimizer of an epoch before the schedulers step, and each scheduler after its step. On a resume
# it builds the schedulers on the loaded optimizer, and then loads their states, which puts no rate into an optimizer. So the
# first resumed epoch has the rate of the epoch before (ExponentialLR), or the one that the training began with (LambdaLR). A
# schedule that multiplies the rate keeps the error until the end.
# Seen (SGD(lr=0.08); 3 epochs, then resumed to 6):
#   ExponentialLR(0.5), unbroken: 0.08 0.04 0.02 0.01 0.005 0.0025
#   ExponentialLR(0.5), resumed:  0.08 0.04 0.02 0.02 0.01 0.005
#   LambdaLR(1 - epoch / 8), unbroken: 0.08 0.07 0.06 0.05 0.04 0.03
#   LambdaLR(1 - epoch / 8), resumed:  0.08 0.07 0.06 0.08 0.04 0.03
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 poutyne==1.19.0 pandas==3.1.1
cd "$folder"
cat >shown.py <<'PY'
import contextlib
import csv
import io
from pathlib import Path

import torch
from poutyne import Experiment, ExponentialLR, LambdaLR
from torch.utils.data import DataLoader, TensorDataset

DATA = DataLoader(TensorDataset(torch.ones(8, 3), torch.ones(8, 1)), 4)
SCHEDULES = {"ExponentialLR(0.5)": lambda: ExponentialLR(0.5), "LambdaLR(1 - epoch / 8)": lambda: LambdaLR(lambda epoch: 1 - epoch / 8)}


def rates(folder, schedule, *until):
    for epochs in until:  # Each is a new process in practice.
        network = torch.nn.Linear(3, 1)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.08)
        experiment = Experiment(folder, network, optimizer=optimizer, loss_function="mse", device="cpu")
        with contextlib.redirect_stdout(io.StringIO()):
            experiment.train(DATA, DATA, epochs=epochs, lr_schedulers=[schedule()], verbose=False)
    with Path(folder, "log.tsv").open() as file:
        return [round(float(row["lr"]), 4) for row in csv.DictReader(file, delimiter="\t")]


found = []
for number, (name, schedule) in enumerate(SCHEDULES.items()):
    for how, until in {"unbroken": (6,), "resumed": (3, 6)}.items():
        found.append(rates(f"{how}-{number}", schedule, *until))
        print(f"{name}, {how + ':':9}", *found[-1])
expected = [
    [0.08, 0.04, 0.02, 0.01, 0.005, 0.0025], [0.08, 0.04, 0.02, 0.02, 0.01, 0.005],
    [0.08, 0.07, 0.06, 0.05, 0.04, 0.03], [0.08, 0.07, 0.06, 0.08, 0.04, 0.03],
]
assert expected == found, "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
