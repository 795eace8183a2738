#!/usr/bin/env bash
# torch 2.13.0: many models mark parameters by attributes, such as `weight._no_weight_decay = True` (Mamba), and build the groups of
# the optimizer from them. load_state_dict keeps the parameter and its marks; load_state_dict(assign=True) replaces it with a
# new one without them, and only requires_grad is carried over. A loader that is switched to assign=True, to save memory, decays
# weights that it did not decay before.
# Seen:
#   decayed: ['weight'], after load_state_dict ['weight'], after assign=True ['weight', 'bias']
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
cat >shown.py <<'PY'
import torch


def decayed(assign):
    model = torch.nn.Linear(2, 2)
    model.bias._no_weight_decay = True
    if assign is not None:
        model.load_state_dict(torch.nn.Linear(2, 2).state_dict(), assign=assign)
    return [name for name, one in model.named_parameters() if not getattr(one, "_no_weight_decay", False)]


seen = [decayed(assign) for assign in (None, False, True)]
print("decayed: {}, after load_state_dict {}, after assign=True {}".format(*seen))
assert seen == [["weight"], ["weight"], ["weight", "bias"]], "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
