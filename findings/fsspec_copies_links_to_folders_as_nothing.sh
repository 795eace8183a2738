#!/usr/bin/env bash
# fsspec 2026.9.0: a recursive cp, put or get of a local folder follows a link to a file, and loses a link to a folder. isdir() says that
# the link is a folder, and ls() lists its files. But find(), which a recursive copy goes by, lists the link itself as a file, and
# copying this "file" makes an empty folder (s3fs copies nothing). There is no error. So the usual "last -> checkpoint-4"
# is an empty folder in each copy. shutil.copytree copies the files.
# Seen (files below last, which is a link to checkpoint-4):
#   ls: model.bin
#   cp: none (last is an empty folder)
#   put to memory: none (last is an empty folder)
#   shutil.copytree: model.bin
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet fsspec==2026.9.0
cd "$folder"
cat >shown.py <<'PY'
import os
import shutil
from pathlib import Path

import fsspec

os.makedirs("run/checkpoint-4")
Path("run/checkpoint-4/model.bin").write_text("weights")
os.symlink("checkpoint-4", "run/last")
local, memory = fsspec.filesystem("file"), fsspec.filesystem("memory")


def names(filesystem, folder):
    return [Path(path).name for path in filesystem.ls(folder, detail=False)]


local.cp("run", "copied", recursive=True)
memory.put("run", "/put", recursive=True)
shutil.copytree("run", "tree")
below = {
    "ls": names(local, "run/last"),
    "cp": names(local, "copied/last"),
    "put to memory": names(memory, "/put/last"),
    "shutil.copytree": names(local, "tree/last"),
}
for name, files in below.items():
    print(f"{name}:", *files or ["none (last is an empty folder)"])
assert [1, 0, 0, 1] == [len(files) for files in below.values()], "the behaviour has changed"
assert local.isdir("copied/last") and memory.isdir("/put/last"), "the behaviour has changed"
assert memory.exists("/put/checkpoint-4/model.bin"), "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
