#!/usr/bin/env bash
# torch 2.13.0: autocast keeps the converted weights until its context ends, also under torch.no_grad(). If load_state_dict, or
# anything else, writes weights within the context, the model goes on with the old ones: a program that loads its best
# checkpoint and measures it under the autocast that it is in measures the weights from before. One would expect weights that
# were written to to be converted again.
# Seen:
#   output before the load, after it, in a new autocast: [2.0, 2.0, 14.0]
#   under no_grad: [2.0, 2.0, 14.0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
cat >shown.py <<'PY'
import contextlib

import torch


def outputs(context):
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    x = torch.ones(1, 2)
    with context, torch.autocast("cpu", torch.bfloat16):
        before = model(x).item()
        model.load_state_dict({"weight": torch.full((1, 2), 7.0)})
        within = model(x).item()
    with torch.autocast("cpu", torch.bfloat16):
        return [before, within, model(x).item()]


seen = [outputs(contextlib.nullcontext()), outputs(torch.no_grad())]
print("output before the load, after it, in a new autocast:", seen[0])
print("under no_grad:", seen[1])
assert [[2.0, 2.0, 14.0], [2.0, 2.0, 14.0]] == seen, f"the behaviour has changed: {seen}"
PY
venv/bin/python -W ignore shown.py
