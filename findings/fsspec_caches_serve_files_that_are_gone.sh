#!/usr/bin/env bash
# fsspec 2026.9.0: simplecache:: and filecache:: keep local copies of remote files. Files that are written through the same
# filesystem are seen. A move or a removal through it is not: the target of a move has the old content, and a removed file can
# still be read, though exists() is False. So last.ckpt that is replaced by a move, as is usual, stays the old one: for a week
# with filecache, and as long as the process lives with simplecache.
# Seen:
#   simplecache: after the move the store has b'new', cat gives b'old'; removed: exists False, cat gives b'old'
#   filecache: after the move the store has b'new', cat gives b'old'; removed: exists False, cat gives b'old'
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet fsspec==2026.9.0
cd "$folder"
cat >shown.py <<'PY'
import fsspec

seen = {}
for cache in ("simplecache", "filecache"):
    fs, path = fsspec.core.url_to_fs(f"{cache}::memory://{cache}/last.ckpt")
    with fs.open(path, "wb") as file:
        file.write(b"old")
    fs.cat(path)
    with fs.open(f"{path}.new", "wb") as file:
        file.write(b"new")
    fs.mv(f"{path}.new", path)
    stored = fsspec.filesystem("memory").cat(path)
    moved = fs.cat(path)
    fs.rm(path)
    seen[cache] = [stored, moved, fs.exists(path), fs.cat(path)]
    print(f"{cache}: after the move the store has {stored}, cat gives {moved}; removed: exists {seen[cache][2]}, cat gives {seen[cache][3]}")
expected = [b"new", b"old", False, b"old"]
assert {"simplecache": expected, "filecache": expected} == seen, f"the behaviour has changed: {seen}"
PY
venv/bin/python -W ignore shown.py
