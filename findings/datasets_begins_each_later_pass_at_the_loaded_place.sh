#!/usr/bin/env bash
# datasets 5.2.0: IterableDataset.load_state_dict is not for the next pass only. Each later pass begins at the loaded place too,
# until set_epoch() gives the dataset another epoch. A training that resumes a stream and does not call set_epoch (nothing
# asks for it if the stream is not shuffled) never sees the first part of its data again. A StatefulDataLoader without workers does
# the same: its second pass is short.
# Seen (6 items, saved after item 3):
#   passes of the dataset:               [4, 5] [4, 5]
#   passes of a StatefulDataLoader:      [4, 5] [4, 5]
#   with set_epoch(1) before the second: [4, 5] [0, 1, 2, 3, 4, 5]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 datasets==5.2.0 torchdata==0.11.0
cd "$folder"
cat >shown.py <<'PY'
import datasets
from torchdata.stateful_dataloader import StatefulDataLoader


def made():
    return datasets.Dataset.from_dict({"x": [*range(6)]}).to_iterable_dataset()


def state_after(data, count):
    passing = iter(data)
    for _ in range(count):
        next(passing)
    return data.state_dict()


def one_pass(data):
    return [int(item["x"]) for item in data]


data = made()
data.load_state_dict(state_after(made(), 4))
direct = one_pass(data), one_pass(data)
print("passes of the dataset:              ", *direct)
loader = StatefulDataLoader(made(), batch_size=None)
loader.load_state_dict(state_after(StatefulDataLoader(made(), batch_size=None), 4))
by_loader = one_pass(loader), one_pass(loader)
print("passes of a StatefulDataLoader:     ", *by_loader)
data = made()
data.load_state_dict(state_after(made(), 4))
first = one_pass(data)
data.set_epoch(1)
with_epoch = first, one_pass(data)
print("with set_epoch(1) before the second:", *with_epoch)
assert ([4, 5], [4, 5]) == direct == by_loader, "the behaviour has changed"
assert ([4, 5], [0, 1, 2, 3, 4, 5]) == with_epoch, "the behaviour has changed"
PY
HF_HUB_OFFLINE=1 HF_HOME="$folder" venv/bin/python -W ignore shown.py
