#!/usr/bin/env bash
# pyro 1.9.2: pyro.module(name, module) registers the parameters of a torch module in the parameter store, which save() writes. If the store has
# parameters of this name already, as after load() in a new process, the module keeps its own ones (update_module_params=False).
# The model computes with the module, and the optimizer steps what is in the store. So the resumed training computes with new random
# weights, and changes none of them: the loss stays the same until the end. No warning.
# Seen:
#   losses, unbroken:     24.859 21.065 17.826
#     and on:             15.146 13.020 11.431
#   resumed after step 3: 25.846 25.846 25.846
#   with update_module_params=True: 15.146 13.020 11.431
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 pyro-ppl==1.9.2
cd "$folder"
cat >shown.py <<'PY'
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO

torch.manual_seed(0)
X = torch.randn(10, 2)


def made(seed, **options):
    pyro.clear_param_store()
    torch.manual_seed(seed)
    net = torch.nn.Linear(2, 1)

    def model(x, y):
        pyro.module("net", net, **options)
        with pyro.plate("points", len(x)):
            pyro.sample("y", dist.Normal(net(x).squeeze(-1), 1.0), obs=y)

    optimizer = pyro.optim.Adam({"lr": 0.1})
    return optimizer, SVI(model, lambda x, y: None, optimizer, Trace_ELBO())


def losses(text, svi, steps):
    seen = [f"{svi.step(X, X.sum(1)):.3f}" for _ in range(steps)]
    print(text, *seen)
    return seen


def load(optimizer):
    pyro.get_param_store().load("parameters")
    optimizer.load("optimizer")


optimizer, svi = made(0)
unbroken = losses("losses, unbroken:    ", svi, 3)
pyro.get_param_store().save("parameters")
optimizer.save("optimizer")
unbroken += losses("  and on:            ", svi, 3)
optimizer, svi = made(9)
load(optimizer)
resumed = losses("resumed after step 3:", svi, 3)
optimizer, svi = made(9, update_module_params=True)
load(optimizer)
updated = losses("with update_module_params=True:", svi, 3)
assert len(set(resumed)) == 1 and updated == unbroken[3:], "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
