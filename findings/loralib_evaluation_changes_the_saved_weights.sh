#!/usr/bin/env bash
# loralib 0.1.2: model.eval() adds the product of the factors to the frozen weight, and train() subtracts it. state_dict() has the
# factors in both modes, and nothing of the mode. So a checkpoint that is written after a validation, before the next train(),
# has the factors in the weight as well: a new model, which begins in the other mode, counts them twice. No key is missing.
# Seen:
#   saved in train mode: the loaded model gives the same outputs
#   saved in eval mode: the loaded model gives other outputs, as with the factors counted twice: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 loralib==0.1.2
cd "$folder"
cat >shown.py <<'PY'
import copy

import loralib
import torch


def made(seed):
    torch.manual_seed(seed)
    layer = loralib.Linear(4, 4, r=2)
    torch.nn.init.normal_(layer.lora_B)
    return layer


inputs = torch.ones(1, 4)
seen = []
for mode in ("train", "eval"):
    model = made(0)
    outputs = model(inputs)
    getattr(model, mode)()
    state = copy.deepcopy(model.state_dict())
    loaded = made(1)
    loaded.load_state_dict(state)
    factors = inputs @ loaded.lora_A.T @ loaded.lora_B.T * loaded.scaling
    twice = torch.allclose(loaded(inputs), outputs + factors, atol=1e-5)
    seen.append((torch.allclose(loaded(inputs), outputs, atol=1e-5), twice))
    how = "the same outputs" if seen[-1][0] else f"other outputs, as with the factors counted twice: {twice}"
    print(f"saved in {mode} mode: the loaded model gives {how}")
assert seen == [(True, False), (False, True)], "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
