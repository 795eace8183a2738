#!/usr/bin/env bash
# torch 2.13.0: an iterator over a DataLoader draws a number from torch's global random state, even if the loader neither
# shuffles nor has workers: it is the seed of workers that are not there. So a validation in the middle of a training
# changes the dropout masks and the order of the data after it, and two runs that differ only in when they validate are
# two trainings. A loader with a generator of its own leaves the global state alone.
#
# Seen:
#   sequential loader, no workers: moved
#   the same with generator=: not moved
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
venv/bin/python -W ignore - <<'PY'
import torch
from torch.utils.data import DataLoader

moved = {}
for name, options in {
    "sequential loader, no workers": {},
    "the same with generator=": {"generator": torch.Generator()},
}.items():
    before = torch.get_rng_state()
    list(DataLoader(range(4), batch_size=2, shuffle=False, num_workers=0, **options))
    moved[name] = not torch.equal(before, torch.get_rng_state())
    print(f"{name}: {'moved' if moved[name] else 'not moved'}")
assert [True, False] == list(moved.values()), f"the behaviour has changed: {moved}"
PY
