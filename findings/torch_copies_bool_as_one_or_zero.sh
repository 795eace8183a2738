#!/usr/bin/env bash
# torch 2.13.0: a bool tensor may hold bytes other than 0 and 1 (a view of uint8, a file, a C extension). clone and copy_
# change them: each such byte becomes 1. torch.save keeps them. So a checkpoint that is written from a copy of the state,
# as each save in the background is, differs from the one that torch.save writes, although torch.equal calls them equal.
# Seen:
#   clone makes [0, 1, 1, 1], copy_ makes [0, 1, 1, 1], torch.save keeps [0, 1, 2, 3]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
cat >shown.py <<'PY'
import io

import torch

flags = torch.arange(4, dtype=torch.uint8).view(torch.bool)
cloned = flags.clone().view(torch.uint8).tolist()
target = torch.empty_like(flags)
target.copy_(flags)
copied = target.view(torch.uint8).tolist()
stream = io.BytesIO()
torch.save(flags, stream)
stream.seek(0)
saved = torch.load(stream, weights_only=True).view(torch.uint8).tolist()
print(f"clone makes {cloned}, copy_ makes {copied}, torch.save keeps {saved}")
assert ([0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 2, 3]) == (cloned, copied, saved), "the behaviour has changed"
PY
venv/bin/python shown.py
