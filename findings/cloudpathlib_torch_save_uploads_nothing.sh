#!/usr/bin/env bash
# cloudpathlib 0.26.0: a CloudPath is an os.PathLike, so torch.save(state, path) works. It writes into the cache on the local
# disk, and nothing is uploaded: the object in the bucket does not exist, or stays the old one. There is no error and no
# warning. The next read through the same CloudPath raises, or reads the old object in another process. path.open("wb") uploads.
# Seen:
#   saved step 1 by open(), then step 2 by the path; in the bucket is step 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 cloudpathlib==0.26.0
cd "$folder"
cat >shown.py <<'PY'
import torch
from cloudpathlib.local import LocalS3Client, LocalS3Path

LocalS3Client().set_as_default_client()  # A bucket on this disk.
path = LocalS3Path("s3://bucket/last.ckpt")
with path.open("wb") as file:
    torch.save({"step": 1}, file)
torch.save({"step": 2}, path)
with LocalS3Client().CloudPath("s3://bucket/last.ckpt").open("rb") as file:  # Another process has another cache.
    step = torch.load(file)["step"]
print("saved step 1 by open(), then step 2 by the path; in the bucket is step", step)
assert 1 == step, f"the behaviour has changed: {step}"
PY
venv/bin/python -W ignore shown.py
