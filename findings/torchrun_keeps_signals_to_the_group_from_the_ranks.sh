#!/usr/bin/env bash
# torch 2.13.0: torchrun starts each rank in a session of its own, so that no rank is in the process group of the job. A signal to
# that group (by a shell, timeout, a scheduler) reaches torchrun only. torchrun forwards SIGTERM to the group of each rank, with
# the rank's children, and kills the group of a rank that still runs after 30 s. --shutdown-timeout or the environment variable
# TORCH_ELASTIC_SHUTDOWN_TIMEOUT changes this time. A SIGKILL to the job's group ends torchrun, and the ranks run on without it.
# Seen (a rank and its child that do not end at SIGTERM; --shutdown-timeout=3):
#   the rank leads a session of its own: True
#   SIGTERM to the job's group: sent by torchrun to ['child', 'rank'], by others to []
#   torchrun killed both 3 to 20 s later: True
#   SIGKILL to the job's group: the rank runs on after 5 s: True
#   the help on --shutdown-timeout: uses TORCH_ELASTIC_SHUTDOWN_TIMEOUT environment variable or defaults to 30 seconds
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
cat >rank.py <<'PY'
import os
import signal

torchrun = os.getppid()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
name = "rank" if os.fork() else "child"
if name == "rank":
    print(os.getpid(), os.getsid(0), flush=True)
while True:
    sender = signal.sigwaitinfo([signal.SIGTERM]).si_pid
    print("torchrun" if sender == torchrun else "others", name, flush=True)
PY
cat >shown.py <<'PY'
import os
import re
import signal
import subprocess
import sys
import time

TORCHRUN = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]


def start():
    command = [*TORCHRUN, "--standalone", "--nproc-per-node=1", "--shutdown-timeout=3", "rank.py"]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True)
    rank, session = job.stdout.readline().split()
    return job, int(rank), int(session)


def runs(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


job, rank, session = start()
own_session = session == rank != job.pid
print(f"the rank leads a session of its own: {own_session}")
began = time.monotonic()
os.killpg(job.pid, signal.SIGTERM)
sent = sorted(line.split() for line in job.stdout)  # Ends with the last process that holds the pipe.
took = time.monotonic() - began
job.wait()
by = {sender: [name for who, name in sent if who == sender] for sender in ("torchrun", "others")}
print(f"SIGTERM to the job's group: sent by torchrun to {by['torchrun']}, by others to {by['others']}")
print(f"torchrun killed both 3 to 20 s later: {3 <= took < 20}")

job, rank, _ = start()
os.killpg(job.pid, signal.SIGKILL)
job.wait()
time.sleep(5)
left = runs(rank)
print(f"SIGKILL to the job's group: the rank runs on after 5 s: {left}")
os.killpg(rank, signal.SIGKILL)

text = subprocess.run([*TORCHRUN, "--help"], capture_output=True, text=True, check=True).stdout
default = re.search(r"SIGKILL\. If not specified, (.*?)\.", " ".join(text.split()))[1]
print(f"the help on --shutdown-timeout: {default}")
assert own_session, "the behaviour has changed"
assert by == {"torchrun": ["child", "rank"], "others": []}, f"the behaviour has changed: {by}"
assert 3 <= took < 20, f"the behaviour has changed: {took}"
assert left, "the behaviour has changed"
assert "defaults to 30 seconds" in default, "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
