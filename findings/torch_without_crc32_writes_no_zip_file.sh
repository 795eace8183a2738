#!/usr/bin/env bash
# torch 2.13.0: torch.serialization.set_crc32_options(False) is offered to save time. It writes the checksum 0 for every
# member, and 0 is not "none" in a zip file: Python's zipfile calls the first member damaged, and so does `unzip -t`.
# torch.load does not look. So a program that checks the file before it is loaded must not believe the zip tools.
# Seen:
#   with CRC32: zipfile finds None
#   without: zipfile finds archive/data.pkl, torch.load reads it: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
cat >shown.py <<'PY'
import io
import zipfile

import torch


def written(crc32):
    torch.serialization.set_crc32_options(crc32)
    stream = io.BytesIO()
    torch.save({"w": torch.ones(2)}, stream)
    return stream


whole, without = written(True), written(False)
first = zipfile.ZipFile(whole).testzip()
print(f"with CRC32: zipfile finds {first}")
second = zipfile.ZipFile(without).testzip()
without.seek(0)
is_read = torch.equal(torch.ones(2), torch.load(without, weights_only=True)["w"])
print(f"without: zipfile finds {second}, torch.load reads it: {is_read}")
assert (None, "archive/data.pkl", True) == (first, second, is_read), "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
