#!/usr/bin/env bash
# peft 0.21.2: the base model of LoRA is frozen, but its BatchNorm layers still count running statistics in train mode. An adapter
# is saved without them: save_pretrained writes the factors alone. The trained model in memory and the adapter loaded
# onto the same base give different outputs. A checkpoint of a Trainer with an adapter holds the adapter alone, so a resume
# begins with the statistics of the base too. With modules_to_save=["1"] for the norm they are saved.
# Seen:
#   adapter alone: the reloaded outputs differ by more than a tenth
#   modules_to_save=["1"]: the reloaded outputs are the same
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.24.0
cd "$folder"
cat >shown.py <<'PY'
import torch
from peft import LoraConfig, PeftModel, get_peft_model


def base():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))


inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)) * 3 + 2
differences = []
for name, also in (("adapter alone", None), ('modules_to_save=["1"]', ["1"])):
    model = get_peft_model(base(), LoraConfig(target_modules=["0", "2"], modules_to_save=also))
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    for _ in range(30):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    model.save_pretrained("adapter")
    reloaded = PeftModel.from_pretrained(base(), "adapter")
    differences.append((model.eval()(inputs) - reloaded.eval()(inputs)).abs().max().item())
    how = "are the same" if differences[-1] == 0 else "differ by more than a tenth" if differences[-1] > 0.1 else "differ"
    print(f"{name}: the reloaded outputs {how}")
assert differences[0] > 0.1 and differences[1] == 0, "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
