#!/usr/bin/env bash
# torch 2.13.0: after a SIGTERM torchrun waits for its ranks, and then ends with a traceback and status 1, though each rank has saved and
# ended with 0. A rank that has failed gives the same status. So a scheduler counts each preemption as a failure: SLURM notes
# FAILED, and a Kubernetes Job uses up its backoffLimit.
# Seen (two ranks):
#   the ranks end by themselves with 0: torchrun ends with 0
#   SIGTERM, and the ranks end with 0: torchrun ends with 1 (SignalException), after ['saved', 'saved']
#   the ranks end with 7: torchrun ends with 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
cat >rank.py <<'PY'
import os
import signal
import sys

if sys.argv[1] != "wait":
    sys.exit(int(sys.argv[1]))
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
print("ready", flush=True)
signal.sigwait([signal.SIGTERM])
print("saved", flush=True)
os._exit(0)
PY
cat >shown.py <<'PY'
import signal
import subprocess
import sys


def start(what):
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "rank.py", what]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def status(what):
    job = start(what)
    job.communicate()
    return job.returncode


whole = status("0")
print(f"the ranks end by themselves with 0: torchrun ends with {whole}")
job = start("wait")
for _ in range(2):
    assert job.stdout.readline() == "ready\n"
job.send_signal(signal.SIGTERM)
saved, errors = job.communicate()
name = errors.strip().splitlines()[-1].split(":")[0].rpartition(".")[2]
print(f"SIGTERM, and the ranks end with 0: torchrun ends with {job.returncode} ({name}), after {saved.split()}")
failed = status("7")
print(f"the ranks end with 7: torchrun ends with {failed}")
assert (0, 1, 1) == (whole, job.returncode, failed), "the behaviour has changed"
assert ("SignalException", ["saved", "saved"]) == (name, saved.split()), "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
