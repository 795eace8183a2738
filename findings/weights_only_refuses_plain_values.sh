#!/usr/bin/env bash
# torch 2.13.0: torch.save takes plain values that torch.load(weights_only=True), the default, refuses: empty bytes
# (but not other bytes), integers of 2040 bits and more, a frozenset (but not a set), a range. Nothing is said at the save.
# Such values are what a big-integer seed, a bit set of samples or an empty buffer is made of.
# Seen:
#   b'a': loaded
#   b'': refused
#   1 << 2038: loaded
#   1 << 2039: refused
#   {1}: loaded
#   frozenset({1}): refused
#   range(3): refused
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
cat >shown.py <<'PY'
import pickle

import torch

VALUES = {
    "b'a'": b"a",
    "b''": b"",
    "1 << 2038": 1 << 2038,
    "1 << 2039": 1 << 2039,
    "{1}": {1},
    "frozenset({1})": frozenset({1}),
    "range(3)": range(3),
}
refused = []
for name, value in VALUES.items():
    torch.save({"value": value}, "value.pt")
    try:
        assert value == torch.load("value.pt", weights_only=True)["value"]
        print(f"{name}: loaded")
    except pickle.UnpicklingError:
        refused.append(name)
        print(f"{name}: refused")
assert ["b''", "1 << 2039", "frozenset({1})", "range(3)"] == refused, f"the behaviour has changed: {refused}"
PY
venv/bin/python -W ignore shown.py
