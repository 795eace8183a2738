#!/usr/bin/env bash
# torch 2.13.0: torch.save writes integers of any size, and torch.load(weights_only=True), the default, reads them up to
# 2039 bits. Beyond that the pickle needs an opcode that the safe unpickler does not know, so that a checkpoint that was
# saved without a word cannot be loaded. Such integers are what a big-integer seed or a bit set of samples is made of.
#
# Seen:
#   2039 bits: loaded
#   2040 bits: UnpicklingError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
venv/bin/python -W ignore - <<'PY'
import pickle

import torch

seen = {}
for bits in (2039, 2040):
    torch.save({"seed": 1 << (bits - 1)}, "seed.pt")
    try:
        torch.load("seed.pt", weights_only=True)
        seen[bits] = "loaded"
    except pickle.UnpicklingError as error:
        seen[bits] = type(error).__name__
    print(f"{bits} bits: {seen[bits]}")
assert {2039: "loaded", 2040: "UnpicklingError"} == seen, f"the behaviour has changed: {seen}"
PY
