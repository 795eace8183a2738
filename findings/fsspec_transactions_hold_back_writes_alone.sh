#!/usr/bin/env bash
# fsspec 2026.9.0: a filesystem has transactions, which hold files back until the block ends, and drop them if it raises. That
# is true of files that are opened or piped. A copy and a removal take effect at once and are not undone. So a program that
# replaces a checkpoint in a transaction, and removes the old one there, has neither if the block raises. One would expect all
# or nothing.
# Seen:
#   memory: after the failed transaction there is ['copy.ckpt'], expected ['old.ckpt']
#   file: after the failed transaction there is ['copy.ckpt'], expected ['old.ckpt']
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet fsspec==2026.9.0
cd "$folder"
cat >shown.py <<'PY'
import tempfile

import fsspec

seen = {}
for protocol, root in (("memory", "/run"), ("file", tempfile.mkdtemp())):
    fs = fsspec.filesystem(protocol)
    fs.pipe(f"{root}/old.ckpt", b"old")
    try:
        with fs.transaction:
            fs.pipe(f"{root}/new.ckpt", b"new")
            fs.cp_file(f"{root}/old.ckpt", f"{root}/copy.ckpt")
            fs.rm(f"{root}/old.ckpt")
            raise ValueError
    except ValueError:
        pass
    seen[protocol] = sorted(name.rsplit("/", 1)[-1] for name in fs.find(root))
    print(f"{protocol}: after the failed transaction there is {seen[protocol]}, expected ['old.ckpt']")
assert {"memory": ["copy.ckpt"], "file": ["copy.ckpt"]} == seen, f"the behaviour has changed: {seen}"
PY
venv/bin/python -W ignore shown.py
