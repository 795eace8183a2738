#!/usr/bin/env bash
# timm 1.0.31: CheckpointSaver.save_recovery keeps the newest two files. find_recovery sorts their names as text and returns
# the first one, so mostly the older of the two. The numbers have no leading zeros: "recovery-1-10" sorts before
# "recovery-1-9". The files that an earlier process left are never removed, because a saver knows only its own: after a restart
# find_recovery returns one of those, and a program that asks it for a file to go on from goes back at each restart.
# Seen:
#   files recovery-1-150 recovery-1-200: find_recovery returns recovery-1-150
#   after a restart files recovery-1-150 recovery-1-200 recovery-3-50 recovery-3-100: find_recovery returns recovery-1-150
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 timm==1.0.31 torchvision==0.28.0
cd "$folder"
cat >shown.py <<'PY'
import contextlib
import os

import torch

for name in ("nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"):
    for operator in (name, f"_{name}_backward"):
        with contextlib.suppress(RuntimeError):  # torchvision is of another build than torch, and nothing here runs it.
            torch.library.define(f"torchvision::{operator}", "(Tensor x) -> Tensor")

from timm.utils import CheckpointSaver

model = torch.nn.Linear(1, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
os.mkdir("out")


def written_and_found(*places):
    saver = CheckpointSaver(model, optimizer, checkpoint_dir="out", recovery_dir="out")
    for place in places:
        saver.save_recovery(*place)
    stems = (name.removesuffix(".pth.tar") for name in os.listdir("out"))
    files = sorted(stems, key=lambda stem: [int(number) for number in stem.split("-")[1:]])
    return files, os.path.basename(saver.find_recovery()).removesuffix(".pth.tar")


first, found = written_and_found((1, 50), (1, 100), (1, 150), (1, 200))
print("files", *first, end=f": find_recovery returns {found}\n")
second, found_again = written_and_found((3, 50), (3, 100))
print("after a restart files", *second, end=f": find_recovery returns {found_again}\n")
assert found == found_again == first[0] == "recovery-1-150" and len(second) == 4, "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
