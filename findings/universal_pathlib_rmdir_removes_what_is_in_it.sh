#!/usr/bin/env bash
# universal_pathlib 0.3.10: a UPath behaves as a pathlib.Path, but rmdir() of a folder that is not empty removes all that is in
# it. Path.rmdir() refuses with OSError. Programs use that to tidy up: they call rmdir() and ignore the error if something is
# left.
# Seen:
#   Path.rmdir(): OSError; best.ckpt is there: True
#   UPath.rmdir(): no error; best.ckpt is there: False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet universal_pathlib==0.3.10 fsspec==2026.9.0
cd "$folder"
cat >shown.py <<'PY'
import pathlib
import tempfile

from upath import UPath

seen = {}
for name, folder in (("Path", pathlib.Path(tempfile.mkdtemp())), ("UPath", UPath("memory://run"))):
    (folder / "empty").mkdir(parents=True)
    (folder / "best.ckpt").write_bytes(b"best")
    try:
        folder.rmdir()
        said = "no error"
    except OSError as error:
        said = type(error).__name__
    seen[name] = [said, (folder / "best.ckpt").exists()]
    print(f"{name}.rmdir(): {said}; best.ckpt is there: {seen[name][1]}")
assert {"Path": ["OSError", True], "UPath": ["no error", False]} == seen, f"the behaviour has changed: {seen}"
PY
venv/bin/python -W ignore shown.py
