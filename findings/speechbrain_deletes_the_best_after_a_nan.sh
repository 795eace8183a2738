#!/usr/bin/env bash
# speechbrain 1.1.2: the Checkpointer sorts checkpoints by a metric to find the best ones. NaN is neither less nor greater than any number, so one
# NaN in the list stops the sort from ordering what lies on both sides of it. save_and_keep_only(min_keys=["loss"]) then deletes the best
# checkpoint and keeps the newest, which also is what find_checkpoint(min_key="loss") returns. Nothing is said.
# Seen (num_to_keep=1):
#   losses 0.5 0.2 0.9 - kept 0.2 0.9 - the best is 0.2
#   losses 0.5 0.2 nan 0.9 - kept 0.9 - the best is 0.9
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 speechbrain==1.1.2
cd "$folder"
cat >shown.py <<'PY'
import logging
import sys
import tempfile
import types

sys.modules["torchaudio"] = types.ModuleType("torchaudio")  # It is imported, and not used here.
sys.modules["torchaudio"].__version__ = "2.11.0"
logging.disable()

import torch
from speechbrain.utils.checkpoints import Checkpointer


def saved(losses):
    with tempfile.TemporaryDirectory() as folder:
        saver = Checkpointer(folder, {"model": torch.nn.Linear(1, 1)})
        for loss in losses:
            saver.save_and_keep_only(meta={"loss": loss}, name=str(loss), min_keys=["loss"], num_to_keep=1)
        kept = sorted(found.meta["loss"] for found in saver.list_checkpoints())
        return kept, saver.find_checkpoint(min_key="loss").meta["loss"]


for losses in ([0.5, 0.2, 0.9], [0.5, 0.2, float("nan"), 0.9]):
    kept, best = saved(losses)
    print("losses", *losses, "- kept", *kept, "- the best is", best)
assert (kept, best) == ([0.9], 0.9), "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
