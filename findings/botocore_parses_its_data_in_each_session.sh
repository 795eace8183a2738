#!/usr/bin/env bash
# s3fs 2026.9.0 and aiobotocore 3.10.0 with botocore 1.43.117: botocore describes each service in JSON files, and caches what it has
# parsed of them per session, not per process. Each S3FileSystem makes a session of its own, so a process with filesystems of
# different options (two buckets with two keys, say) reads and parses the same 7 files (megabytes of JSON) for each of them. A
# loader that is registered in all sessions is a cache for all of them.
# Seen:
#   a first S3FileSystem opens 7 files of botocore
#   one with another option opens 7 files of botocore, the same
#   a session with the loader of another one opens 0 files of botocore
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet s3fs==2026.9.0 aiobotocore==3.10.0 botocore==1.43.117
cd "$folder"
cat >shown.py <<'PY'
import sys

import s3fs
from botocore.session import Session

opened = []


def note(event, arguments):
    if event == "open" and "/botocore/data/" in str(arguments[0]):
        opened.append(arguments[0])


def opened_by(title, make, same=""):
    opened.clear()
    make()
    print(f"{title} opens {len(opened)} files of botocore{same}")
    return set(opened)


def filesystem(**options):
    return s3fs.S3FileSystem(key="a", secret="b", client_kwargs={"region_name": "us-east-1"}, **options).connect


def session_with(loader):
    session = Session()
    session.register_component("data_loader", loader)
    session.create_client("s3", region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b")


sys.addaudithook(note)
first = opened_by("a first S3FileSystem", filesystem())
second = opened_by("one with another option", filesystem(default_block_size=2**20), ", the same")
loader = Session().get_component("data_loader")
session_with(loader)
shared = opened_by("a session with the loader of another one", lambda: session_with(loader))
assert len(first) == 7 and first == second and not shared, "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
