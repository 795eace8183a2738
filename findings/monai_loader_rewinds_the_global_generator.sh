#!/usr/bin/env bash
# monai 1.6.1: to build a monai.data.DataLoader without workers seeds torch's global generator again, with the seed that the program began with.
# A program that builds its validation loader in each epoch trains each epoch with the same dropout masks and the same order,
# and one that puts a random state back and then builds a loader has lost that state. The DataLoader of torch leaves it alone.
# The transforms get their seed at that moment too, and only then: a resumed process begins their sequence again.
# Seen (three epochs, each builds a validation loader at its end):
#   monai.data.DataLoader: 1 dropout mask, 1 order of the training data
#   torch's DataLoader: 3 dropout masks, 3 orders of the training data
#   a random state is put back, and a monai.data.DataLoader is built: the state is still there: False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 monai==1.6.1
cd "$folder"
cat >shown.py <<'PY'
import monai.data
import torch
from torch.utils.data import DataLoader

DATA = list(range(100))


def epochs(loader):
    torch.manual_seed(0)
    training, masks, orders = loader(DATA, batch_size=100, shuffle=True), set(), set()
    for _ in range(3):
        (batch,) = training
        orders.add(tuple(batch.tolist()))
        masks.add(tuple(torch.nn.functional.dropout(torch.ones(100)).tolist()))
        loader(DATA)  # The validation loader.
    return len(masks), len(orders)


def counted(number, what):
    return f"{number} {what}{'' if number == 1 else 's'}"


found = epochs(monai.data.DataLoader), epochs(DataLoader)
for name, (masks, orders) in zip(("monai.data.DataLoader", "torch's DataLoader"), found, strict=True):
    print(f"{name}: {counted(masks, 'dropout mask')}, {counted(orders, 'order')} of the training data")
torch.rand(5)
state = torch.get_rng_state()
torch.manual_seed(1)
torch.set_rng_state(state)
monai.data.DataLoader(DATA)
kept = torch.equal(state, torch.get_rng_state())
print(f"a random state is put back, and a monai.data.DataLoader is built: the state is still there: {kept}")
assert (((1, 1), (3, 3)), False) == (found, kept), "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
