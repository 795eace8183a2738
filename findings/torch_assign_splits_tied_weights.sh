#!/usr/bin/env bash
# torch 2.13.0: load_state_dict(assign=True), as used with a model on the meta device, makes a parameter of its own for each key.
# Two tied weights are then two parameters over the same memory: nothing is missing and the outputs are right, but each has a
# gradient of its own, and an optimizer steps the shared memory twice, with two momenta. The training goes on otherwise. The
# same program without assign=True keeps the tie. A model has to be tied again after the load.
# Seen:
#   parameters: 1 as built, 1 after load_state_dict, 2 after assign=True
#   the two share their memory: True
#   the weight after one and two steps: 0.9000 0.8004, with assign=True 0.8000 0.6024
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
cat >shown.py <<'PY'
import copy

import torch


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Linear(1, 1, bias=False)
        self.head = torch.nn.Linear(1, 1, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, inputs):
        return self.head(self.embedding(inputs))


def trained(model):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    seen = []
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()
        seen.append(f"{model.head.weight.item():.4f}")
    return " ".join(seen)


weight = torch.ones(1, 1)
state = {"embedding.weight": weight, "head.weight": weight}
copied, assigned = Tied(), Tied()
copied.load_state_dict(copy.deepcopy(state))
assigned.load_state_dict(copy.deepcopy(state), assign=True)
counts = [len(list(model.parameters())) for model in (Tied(), copied, assigned)]
print("parameters: {} as built, {} after load_state_dict, {} after assign=True".format(*counts))
is_shared = assigned.head.weight.data_ptr() == assigned.embedding.weight.data_ptr()
print(f"the two share their memory: {is_shared}")
one, other = trained(copied), trained(assigned)
print(f"the weight after one and two steps: {one}, with assign=True {other}")
assert (counts, is_shared) == ([1, 1, 2], True) and one != other, "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
