#!/usr/bin/env bash
# torch 2.13.0: Optimizer.load_state_dict converts each tensor of the state to the type of its parameter, except one that is
# called "step". NAdam keeps a product of its momenta in float32, also for a parameter in bfloat16: a resume rounds it to 8 bits,
# and it stays in bfloat16 from then on. The Adafactor of transformers keeps all of its state in float32: a resume rounds all
# of it. Both go on with other weights than without a resume. AdamW has states of the parameter's type and is exact, which
# hides the conversion. Nothing is raised or logged.
# Seen:
#   AdamW: nothing converted, the resumed weights are the same
#   NAdam: mu_product float32 -> bfloat16, the resumed weights differ
#   Adafactor: RMS, exp_avg_sq, exp_avg_sq_col, exp_avg_sq_row float32 -> bfloat16, the resumed weights differ
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.24.0
cd "$folder"
cat >shown.py <<'PY'
import copy

import torch
from transformers.optimization import Adafactor

BATCHES = [torch.randn(8, 16, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in range(20)]


def new(kind):
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 16).bfloat16()
    return model, kind(model.parameters(), **({} if kind is Adafactor else {"lr": 0.01}))


def train(model, optimizer, batches):
    for batch in batches:
        optimizer.zero_grad()
        (model(batch) - batch).square().mean().backward()
        optimizer.step()


def types_of(optimizer):
    tensors = [item for values in optimizer.state_dict()["state"].values() for item in values.items()]
    return {name: str(value.dtype).removeprefix("torch.") for name, value in tensors if torch.is_tensor(value)}


seen = []
for kind in (torch.optim.AdamW, torch.optim.NAdam, Adafactor):
    model, optimizer = new(kind)
    train(model, optimizer, BATCHES[:2])
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    before = types_of(optimizer)
    train(model, optimizer, BATCHES[2:])
    resumed, resumed_optimizer = new(kind)
    resumed.load_state_dict(saved[0])
    resumed_optimizer.load_state_dict(saved[1])
    after = types_of(resumed_optimizer)
    train(resumed, resumed_optimizer, BATCHES[2:])
    converted = sorted(name for name in before if before[name] != after[name])
    is_same = torch.equal(model.weight, resumed.weight)
    what = f"{', '.join(converted)} float32 -> bfloat16" if converted else "nothing converted"
    print(f"{kind.__name__}: {what}, the resumed weights {'are the same' if is_same else 'differ'}")
    seen.append((len(converted), is_same))
assert seen == [(0, True), (1, False), (4, False)], "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
