#!/usr/bin/env bash
# webdataset 1.0.2: the buffer of shuffle() draws from a generator of its own, seeded by the process id and the clock. Neither
# random.seed nor torch.manual_seed nor the seed= of the WebDataset reaches it: only seed= of shuffle() itself does. A program
# that seeds everything and skips the batches that it had used gets samples twice after a restart, and others never. With
# seed= given to shuffle() each epoch has the same order.
# Seen:
#   every seed set, shuffle(100): three passes, 3 orders
#   shuffle(100, seed=1): three passes, 1 order
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 webdataset==1.0.2
cd "$folder"
cat >shown.py <<'PY'
import random

import numpy as np
import torch
import webdataset as wds

with wds.TarWriter("shard.tar") as writer:
    for number in range(100):
        writer.write({"__key__": str(number), "cls": str(number).encode()})


def order(**options):
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    data = wds.WebDataset("shard.tar", shardshuffle=False, seed=1).shuffle(100, **options)
    return tuple(int(sample["cls"]) for sample in data)


seeded_before, seeded_itself = {order() for _ in range(3)}, {order(seed=1) for _ in range(3)}
print(f"every seed set, shuffle(100): three passes, {len(seeded_before)} orders")
print(f"shuffle(100, seed=1): three passes, {len(seeded_itself)} order")
assert (3, 1) == (len(seeded_before), len(seeded_itself)), "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
