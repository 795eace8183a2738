#!/usr/bin/env bash
# fsspec 2026.9.0: if the block of `with fs.open(url, "wb")` raises, the file is closed as usual, so that what was written until
# then becomes the object, and replaces the complete one that was there. It is shown with the filesystem in memory; s3fs
# 2026.9.0 did the same with a server of moto 5.2.5, by hand. An object store shows an object when its upload ends, so one would
# expect a failed one to leave the old object. With the block in fs.transaction it does.
# Seen:
#   after the block has raised: b'half'
#   within a transaction: b'a whole checkpoint'
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet fsspec==2026.9.0
cd "$folder"
cat >shown.py <<'PY'
import contextlib

import fsspec

fs = fsspec.filesystem("memory")


def left(context):
    fs.pipe("/last.ckpt", b"a whole checkpoint")
    with contextlib.suppress(OSError), context, fs.open("/last.ckpt", "wb") as file:
        file.write(b"half")
        raise OSError("a value cannot be read")
    return fs.cat("/last.ckpt")


seen = [left(contextlib.nullcontext()), left(fs.transaction)]
print("after the block has raised:", seen[0])
print("within a transaction:", seen[1])
assert [b"half", b"a whole checkpoint"] == seen, f"the behaviour has changed: {seen}"
PY
venv/bin/python -W ignore shown.py
