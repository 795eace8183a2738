#!/usr/bin/env bash
# torch 2.13.0: an ExportedProgram refers to the weights of the model. If the model is trained on, the exported program changes
# too. A program that exports its best model and calls torch.export.save at the end saves the last weights. One would expect an
# export to be a copy.
# Seen:
#   output when exported: 2.0, of the saved file: 18.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
cat >shown.py <<'PY'
import io

import torch

model = torch.nn.Linear(2, 1, bias=False)
torch.nn.init.ones_(model.weight)
x = torch.ones(1, 2)
best = torch.export.export(model, (x,))
exported = best.module()(x).item()
with torch.no_grad():
    model.weight.fill_(9.0)  # The training goes on.
file = io.BytesIO()
torch.export.save(best, file)
file.seek(0)
saved = torch.export.load(file).module()(x).item()
print(f"output when exported: {exported}, of the saved file: {saved}")
assert [2.0, 18.0] == [exported, saved], f"the behaviour has changed: {exported}, {saved}"
PY
venv/bin/python -W ignore shown.py
