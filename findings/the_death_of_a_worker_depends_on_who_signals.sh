#!/usr/bin/env bash
# torch 2.13.0: what SIGTERM does to a DataLoader's worker depends on the sender. From the training process the worker ends
# quietly, with status 0; from any other process (a scheduler that signals the group, a shell) it dies of the signal, and
# torch raises a RuntimeError in the training, at any line of it. A Python handler that the worker inherited runs in
# neither case. So a test that signals the group from within the training shows nothing about what a scheduler does.
# Seen:
#   from the training: quiet, status 0
#   from another process: DataLoader worker is killed by signal
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
cat >shown.py <<'PY'
import os
import signal
import subprocess
import time

from torch.utils.data import DataLoader


def worker_after(kill):
    batches = iter(DataLoader(range(10**6), num_workers=1, multiprocessing_context="fork"))
    next(batches)
    worker = batches._workers[0]
    try:
        kill(worker.pid)
        worker.join(5)
        return f"quiet, status {worker.exitcode}"
    except RuntimeError as error:
        return "DataLoader worker is killed by signal" if "is killed by signal: Terminated" in str(error) else str(error)


def from_elsewhere(pid):
    subprocess.run(["kill", str(pid)], check=True)
    time.sleep(2)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: print("the inherited handler ran"))
    here = worker_after(lambda pid: os.kill(pid, signal.SIGTERM))
    print(f"from the training: {here}")
    there = worker_after(from_elsewhere)
    print(f"from another process: {there}")
    assert (here, there) == ("quiet, status 0", "DataLoader worker is killed by signal"), "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
