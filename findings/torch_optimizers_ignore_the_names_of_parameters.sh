#!/usr/bin/env bash
# torch 2.13.0: an optimizer may be given named parameters, and its state_dict() has the names in param_names. load_state_dict
# does not look at them: it goes by position. If the parameters come in another order and the shapes fit, each gets the averages
# of another one, without an error, and param_names has the saved names from then on, which are wrong. One would expect the
# state to go by name, or an error.
# Seen:
#   averages of a and b, saved: [0.1, 0.5]
#   loaded: [0.5, 0.1]
#   param_names of the optimizer whose first parameter is b: ['a', 'b']
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
cat >shown.py <<'PY'
import torch

a, b = (torch.nn.Parameter(torch.ones(2)) for _ in "ab")
saved = torch.optim.Adam([("a", a), ("b", b)])
(a.sum() + 5 * b.sum()).backward()
saved.step()
loaded = torch.optim.Adam([("b", b), ("a", a)])
loaded.load_state_dict(saved.state_dict())
averages = [[round(one.state[p]["exp_avg"][0].item(), 3) for p in (a, b)] for one in (saved, loaded)]
names = loaded.param_groups[0]["param_names"]
print("averages of a and b, saved:", averages[0])
print("loaded:", averages[1])
print("param_names of the optimizer whose first parameter is b:", names)
assert [[[0.1, 0.5], [0.5, 0.1]], ["a", "b"]] == [averages, names], f"the behaviour has changed: {averages}, {names}"
PY
venv/bin/python -W ignore shown.py
