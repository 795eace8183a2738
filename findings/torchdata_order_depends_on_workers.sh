#!/usr/bin/env bash
# torchdata 0.11.0: with one seed a shuffled StatefulDataLoader gives another order with workers than without: its sampler
# shuffles when it is asked for an iterator, and an iterator with workers asks twice. torch's own DataLoader gives the same
# order for any number of workers. Changing num_workers when a training is resumed on another machine changes its data.
# Seen (the first pass over 8 items):
#   DataLoader, 0 workers: [5, 3, 1, 7, 2, 6, 4, 0]
#   DataLoader, 2 workers: [5, 3, 1, 7, 2, 6, 4, 0]
#   StatefulDataLoader, 0 workers: [4, 0, 7, 3, 2, 5, 1, 6]
#   StatefulDataLoader, 2 workers: [3, 0, 4, 2, 7, 6, 5, 1]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 torchdata==0.11.0
cd "$folder"
cat >shown.py <<'PY'
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

if __name__ == "__main__":
    same = []
    for kind in (DataLoader, StatefulDataLoader):
        orders = []
        for workers in (0, 2):
            torch.manual_seed(0)
            seed = torch.Generator().manual_seed(0)
            loader = kind(range(8), batch_size=4, shuffle=True, generator=seed, num_workers=workers)
            orders.append([item for batch in loader for item in batch.tolist()])
            print(f"{kind.__name__}, {workers} workers: {orders[-1]}")
        same.append(orders[0] == orders[1])
    assert [True, False] == same, f"the behaviour has changed: {same}"
PY
venv/bin/python -W ignore shown.py
