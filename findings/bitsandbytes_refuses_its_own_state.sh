#!/usr/bin/env bash
# bitsandbytes 0.50.2: the state_dict() of a quantised Linear4bit has the packed weight, and five keys that say how it was
# quantised. load_state_dict of the same layer takes none of the five: strict loading raises an error about its own keys, and
# with strict=False a layer of other weights gets the packed weight, keeps the scales of its own, and gives wrong outputs
# without an error. Linear8bitLt takes its state back.
# Seen:
#   Linear8bitLt takes its own state: True
#   Linear4bit takes its own state: False, unexpected: absmax, quant_map, nested_absmax, nested_quant_map, bitsandbytes__nf4
#   with strict=False the outputs differ from those that were saved: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 bitsandbytes==0.50.2
cd "$folder"
cat >shown.py <<'PY'
import copy

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt


def made(kind, seed, **options):
    torch.manual_seed(seed)
    return kind(64, 64, bias=False, **options).to("cpu")


def is_taken(layer):
    try:
        layer.load_state_dict(copy.deepcopy(layer.state_dict()))
    except RuntimeError:
        return False
    return True


eight, four = made(Linear8bitLt, 0, has_fp16_weights=False), made(Linear4bit, 0, quant_type="nf4")
both = is_taken(eight), is_taken(four)
other = made(Linear4bit, 1, quant_type="nf4")
left = other.load_state_dict(copy.deepcopy(four.state_dict()), strict=False).unexpected_keys
print(f"Linear8bitLt takes its own state: {both[0]}")
names = [key.rpartition(".")[2].removeprefix("weight.") for key in left]
print(f"Linear4bit takes its own state: {both[1]}, unexpected:", ", ".join(names))
inputs = torch.randn(4, 64)
differs = not torch.allclose(four(inputs), other(inputs), atol=1e-3)
print(f"with strict=False the outputs differ from those that were saved: {differs}")
assert both == (True, False) and len(left) == 5 and differs, "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
