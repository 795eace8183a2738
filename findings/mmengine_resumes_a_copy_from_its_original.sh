#!/usr/bin/env bash
# mmengine-lite 0.10.7: last_checkpoint, by which resume=True finds the newest checkpoint, holds an absolute path. A copy of a
# work_dir, made to try something else from the same state, resumes from the files of the original: silently from a
# later state if that went on training. If the original was moved away, the resume fails although all files are there.
# (With torch 2.6 or newer it can resume its own files only with TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1.)
# Seen:
#   the copy's epoch_1.pth holds 1.0; resume=True in the copy began with 7.0, from first/epoch_1.pth
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 torchvision==0.28.0 packaging matplotlib rich mmengine-lite==0.10.7 \
  opencv-python-headless==5.0.0.93
cd "$folder"
cat >shown.py <<'PY'
import contextlib
import shutil
from pathlib import Path

import torch

for name in ("nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"):
    for operator in (name, f"_{name}_backward"):
        with contextlib.suppress(RuntimeError):  # The compiled part of torchvision may not fit; nothing here runs it.
            torch.library.define(f"torchvision::{operator}", "(Tensor x) -> Tensor")

from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.data import DataLoader


class Net(BaseModel):
    def __init__(self, value):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([value]))

    def forward(self, *x, mode="loss"):
        return {"loss": self.w.sum() * 0}


def train(folder, epochs, value=0.0, resume=False):
    model = Net(value)
    runner = Runner(
        model, work_dir=folder, resume=resume, experiment_name=f"{folder}{epochs}{value}", log_level="CRITICAL",
        train_dataloader=DataLoader([torch.ones(1)] * 2, batch_size=1, collate_fn=lambda x: x),
        train_cfg={"by_epoch": True, "max_epochs": epochs},
        optim_wrapper={"optimizer": torch.optim.SGD(model.parameters(), lr=0.0)},
    )
    runner.train()
    return model.w.item()


train("first", 1, 1.0)
shutil.copytree("first", "copy")
shutil.rmtree("first")
train("first", 1, 7.0)  # The original goes on to another state.
own = torch.load("copy/epoch_1.pth", weights_only=False)["state_dict"]["w"].item()
named = Path("copy/last_checkpoint").read_text()
began = train("copy", 2, resume=True)
said = Path(named).relative_to(Path.cwd())
print(f"the copy's epoch_1.pth holds {own}; resume=True in the copy began with {began}, from {said}")
assert (1.0, 7.0) == (own, began), "the behaviour has changed"
PY
TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 venv/bin/python -W ignore shown.py 2>&1 | grep -v "^Loads checkpoint"
