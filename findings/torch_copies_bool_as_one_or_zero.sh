#!/usr/bin/env bash
# torch 2.13.0: a bool tensor may hold bytes other than 0 and 1 (a view of uint8, a file, a C extension). copy_, clone and
# torch._foreach_copy_ do not agree on what becomes of them: copy_ between tensors makes each such byte 1, clone keeps it.
# So a snapshot that copies into buffers of its own is not, byte for byte, what a blocking torch.save writes.
# Seen:
#   clone keeps [0, 1, 2, 3], copy_ makes [0, 1, 1, 1], torch.save keeps [0, 1, 2, 3]
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
print(f"clone keeps {cloned}, copy_ makes {copied}, torch.save keeps {saved}")
assert ([0, 1, 2, 3], [0, 1, 1, 1], [0, 1, 2, 3]) == (cloned, copied, saved), "the behaviour has changed"
PY
venv/bin/python shown.py
