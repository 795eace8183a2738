#!/usr/bin/env bash
# torch 2.13.0: torch.distributed.checkpoint writes the integers of a quantized tensor and not its scale. dcp.load copies them
# into the tensor that it is given, with the scale of that one: 1.0 becomes 3.5, without an error. torch.save keeps scale and
# zero point. One would expect the values, or an error, because the scale is calibrated and so differs in a fresh model.
# Seen:
#   saved [1.0, 2.0] with the scale 0.1; loaded by dcp.load: [3.5, 8.5]
#   loaded by torch.load: [1.0, 2.0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
cat >shown.py <<'PY'
import torch
import torch.distributed.checkpoint as dcp

saved = torch.quantize_per_tensor(torch.tensor([1.0, 2.0]), 0.1, 0, torch.qint8)
dcp.save({"w": saved}, checkpoint_id="run", no_dist=True)
state = {"w": torch.quantize_per_tensor(torch.zeros(2), 0.5, 3, torch.qint8)}  # As a model has it before it is calibrated.
dcp.load(state, checkpoint_id="run", no_dist=True)
by_dcp = state["w"].dequantize().tolist()
torch.save(saved, "saved.pt")
by_torch = torch.load("saved.pt").dequantize().tolist()
print("saved [1.0, 2.0] with the scale 0.1; loaded by dcp.load:", by_dcp)
print("loaded by torch.load:", by_torch)
assert [[3.5, 8.5], [1.0, 2.0]] == [by_dcp, by_torch], f"the behaviour has changed: {by_dcp}, {by_torch}"
PY
venv/bin/python -W ignore shown.py
