#!/usr/bin/env bash
# accelerate 1.15.0: `accelerate launch` with one process starts the training with subprocess.Popen, and waits for it without a handler.
# A SIGTERM to the launcher alone (by a container's runtime, a supervisor, kill) ends the launcher at once. The training gets no
# signal and saves nothing: it runs on as an orphan, until it ends or the machine kills it.
# Seen (the training has a handler for SIGTERM that saves):
#   SIGTERM to the launcher: its status is -15, and the training got nothing
#   the training runs on 3 s later: True
#   SIGTERM to the training itself: it saves
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 accelerate==1.15.0
cd "$folder"
cat >training.py <<'PY'
import os
import signal

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
print(os.getpid(), flush=True)
signal.sigwait([signal.SIGTERM])
print("it saves", flush=True)
PY
cat >shown.py <<'PY'
import os
import select
import signal
import subprocess
import time
from pathlib import Path

launch = ["venv/bin/accelerate", "launch", "--cpu", "--num_processes", "1", "training.py"]
job = subprocess.Popen(
    launch, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True, env=os.environ | {"HF_HOME": "."},
)
training = int(job.stdout.readline())
job.send_signal(signal.SIGTERM)
status = job.wait()
time.sleep(3)
printed = bool(select.select([job.stdout], [], [], 0)[0])
runs = b"training.py" in Path(f"/proc/{training}/cmdline").read_bytes()
print(f"SIGTERM to the launcher: its status is {status}, and the training got {'it' if printed else 'nothing'}")
print(f"the training runs on 3 s later: {runs}")
os.kill(training, signal.SIGTERM)
then = job.stdout.readline().strip()
print(f"SIGTERM to the training itself: {then}")
assert (-signal.SIGTERM, False, True, "it saves") == (status, printed, runs, then), "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
