#!/usr/bin/env bash
# multiprocessing of Python 3.11.7 (3.10, 3.12 and 3.13 do the same): set_forkserver_preload is a method of a context, and "context
# objects allow one to use multiple start methods in the same program". But a process has one list of preloads, whichever context
# or module-level function sets it: a call replaces the list that was set before, without an error. A library or a test that sets
# its preloads takes away those of the program, and each worker of the program imports its modules again.
# Seen (wave is set by the context, cmd by multiprocessing.set_forkserver_preload):
#   the last call is of the module: wave preloaded: False, cmd preloaded: True
#   the last call is of the context: wave preloaded: True, cmd preloaded: False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat >shown.py <<'PY'
import multiprocessing
import sys


def preloaded(queue):
    queue.put([name in sys.modules for name in ("wave", "cmd")])


if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    calls = [(context, "wave"), (multiprocessing, "cmd")]
    for setter, name in calls if sys.argv[1] == "module-last" else reversed(calls):
        setter.set_forkserver_preload([name])
    queue = context.SimpleQueue()
    worker = context.Process(target=preloaded, args=(queue,))
    worker.start()
    wave, cmd = queue.get()
    worker.join()
    print(f"the last call is of the {sys.argv[1][:-5]}: wave preloaded: {wave}, cmd preloaded: {cmd}")
    assert (wave, cmd) == (sys.argv[1] == "context-last", sys.argv[1] == "module-last"), "the behaviour has changed"
PY
python3 -W ignore shown.py module-last
python3 -W ignore shown.py context-last
