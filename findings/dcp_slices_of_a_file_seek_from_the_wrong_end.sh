#!/usr/bin/env bash
# torch 2.13.0: torch.distributed.checkpoint gives each item of a .distcp file to its reader as a view, a binary stream of
# its own. Its tell() counts from the beginning of the view, but seek() returns the place in the whole file, and counts from
# the end in the wrong direction: seek(-1, SEEK_END) goes one byte beyond the end. read(1) there returns not one byte and
# not none, but all that follows in the file, so bytes of other tensors. A format that is read from its end (zip, npz,
# parquet) is not safe to read from such a view.
# Seen:
#   bytes 20 to 70 of a file of 100 bytes, seek(-1, SEEK_END), read(1):
#   a stream: returns 49, reads 1 byte from 69 on
#   the view: returns 71, reads 29 bytes from 71 on
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
cat >shown.py <<'PY'
import io

from torch.distributed.checkpoint.utils import _create_file_view

content = bytes(range(100))
print("bytes 20 to 70 of a file of 100 bytes, seek(-1, SEEK_END), read(1):")
seen = []
for name, one in {"a stream": io.BytesIO(content[20:70]), "the view": _create_file_view(io.BytesIO(content), 20, 50)}.items():
    place, read = one.seek(-1, io.SEEK_END), one.read(1)
    print(f"{name}: returns {place}, reads {len(read)} byte{'s' * (len(read) > 1)} from {read[0]} on")
    seen.append((place, len(read), read[0]))
assert seen == [(49, 1, 69), (71, 29, 71)], "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
