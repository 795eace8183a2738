#!/usr/bin/env bash
# timm 1.0.31: CheckpointSaver compares each metric with the best one so far. Nothing is better than NaN, so if the first
# metric is NaN, as after an overflow in the first epoch, it stays the best: model_best.pth.tar holds the model of that epoch
# until the end of the training. With max_history=1 it also is the only numbered checkpoint, and no later one replaces it.
# Seen:
#   metrics nan 0.5 0.7 0.9, more is better
#   model_best.pth.tar is of epoch 0, metric nan
#   numbered checkpoints: checkpoint-0.pth.tar
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 timm==1.0.31 torchvision==0.28.0
cd "$folder"
cat >shown.py <<'PY'
import contextlib
import math
import os

import torch

for name in ("nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"):
    for operator in (name, f"_{name}_backward"):
        with contextlib.suppress(RuntimeError):  # torchvision is of another build than torch, and nothing here runs it.
            torch.library.define(f"torchvision::{operator}", "(Tensor x) -> Tensor")

from timm.utils import CheckpointSaver

METRICS = [math.nan, 0.5, 0.7, 0.9]
model = torch.nn.Linear(1, 1)
os.mkdir("out")
saver = CheckpointSaver(model, torch.optim.SGD(model.parameters(), lr=0.1), checkpoint_dir="out", max_history=1)
for epoch, metric in enumerate(METRICS):
    saver.save_checkpoint(epoch, metric)
best = torch.load("out/model_best.pth.tar", weights_only=True)
numbered = [name for name in os.listdir("out") if name.startswith("checkpoint-")]
print("metrics", *METRICS, end=", more is better\n")
print(f"model_best.pth.tar is of epoch {best['epoch']}, metric {best['metric']}")
print("numbered checkpoints:", *numbered)
assert best["epoch"] == 0 and numbered == ["checkpoint-0.pth.tar"], "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
