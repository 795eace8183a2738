#!/usr/bin/env bash
# torch 2.13.0: Optimizer.load_state_dict makes a new object of each iterable value in the state of a parameter, by calling its type with a
# generator of the items. A text is iterable too, so "fast" comes back as "<generator object ...>", without an error. A deque loses its
# maxlen, so a window of the last values never drops one again. Bytes, lists and sets come back as they were. The same values in a
# param_group are not changed.
# Seen:
#   in the state of a parameter: mode '<generator object Optimizer'..., window of at most 2: 5 values after 3 more
#   in a param_group:            mode 'fast'
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
cat >shown.py <<'PY'
from collections import deque

import torch


def made():
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(1))], "mode": "fast"}], lr=1.0)


first, second = made(), made()
first.state[first.param_groups[0]["params"][0]] |= {"mode": "fast", "window": deque([1.0, 2.0], maxlen=2)}
second.load_state_dict(first.state_dict())
(state,) = second.state.values()
for value in (3.0, 4.0, 5.0):
    state["window"].append(value)
count = len(state["window"])
print(f"in the state of a parameter: mode {state['mode'][:27]!r}..., window of at most 2: {count} values after 3 more")
print(f"in a param_group:            mode {second.param_groups[0]['mode']!r}")
assert state["mode"].startswith("<generator object") and count == 5, "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
