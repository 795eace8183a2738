#!/usr/bin/env bash
# safetensors 0.8.0: save and save_file write the entries of metadata= in an order that changes from call to call, within one
# process too. The same tensors with the same metadata are files of other bytes. So a digest, a cache by content or a
# deduplicating store does not find that two checkpoints are the same. With one entry, or none, the bytes are the same.
# Seen:
#   different files among 20 saves: 1 with one entry, more with six
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 safetensors==0.8.0
cd "$folder"
cat >shown.py <<'PY'
import torch
from safetensors.torch import save

weights = {"weight": torch.ones(2), "bias": torch.zeros(1)}
counts = []
for entries in (1, 6):
    metadata = {f"key{number}": str(number) for number in range(entries)}
    counts.append(len({save(weights, metadata) for _ in range(20)}))
print(f"different files among 20 saves: {counts[0]} with one entry, {'more' if counts[1] > 1 else '1'} with six")
assert counts[0] == 1 and counts[1] > 1, "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
