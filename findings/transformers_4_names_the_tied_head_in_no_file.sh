#!/usr/bin/env bash
# transformers 4.57.6: save_pretrained of a GPT-2 with a tied head names the head in neither file. model.safetensors has no
# lm_head.weight, because the head is the embedding, and config.json has no tie_word_embeddings, because True is the default. So
# the files alone do not show whether the head is tied or a tensor is missing: the reader has to know the default of
# transformers. transformers 5.24.0 writes tie_word_embeddings.
# Seen (keys of config.json with "tie"; tensors outside of the blocks; metadata of model.safetensors):
#   tied: {} ['ln_f.bias', 'ln_f.weight', 'wpe.weight', 'wte.weight'] {'format': 'pt'}
#   not tied: {'tie_word_embeddings': False} ['lm_head.weight', 'ln_f.bias', 'ln_f.weight', 'wpe.weight', 'wte.weight'] {'format': 'pt'}
#   the head is the embedding after from_pretrained: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==4.57.6 safetensors==0.8.0
cd "$folder"
cat >shown.py <<'PY'
import json
from pathlib import Path

from safetensors import safe_open
from transformers import GPT2Config, GPT2LMHeadModel


def saved(folder, *, tied):
    sizes = {"vocab_size": 8, "n_embd": 4, "n_layer": 1, "n_head": 1, "bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(**sizes, tie_word_embeddings=tied)).save_pretrained(folder)
    config = json.loads(Path(folder, "config.json").read_text())
    with safe_open(Path(folder, "model.safetensors"), "pt") as file:
        names, metadata = list(file.keys()), file.metadata()
    outside = sorted(name.removeprefix("transformer.") for name in names if ".h." not in name)
    return {key: value for key, value in config.items() if "tie" in key}, outside, metadata


tied, untied = saved("tied", tied=True), saved("untied", tied=False)
print("tied:", *tied)
print("not tied:", *untied)
model = GPT2LMHeadModel.from_pretrained("tied")
same = model.lm_head.weight is model.transformer.wte.weight
print(f"the head is the embedding after from_pretrained: {same}")
assert ({}, ["ln_f.bias", "ln_f.weight", "wpe.weight", "wte.weight"], {"format": "pt"}) == tied, "the behaviour has changed"
assert {"tie_word_embeddings": False} == untied[0], "the behaviour has changed"
assert "lm_head.weight" in untied[1], "the behaviour has changed"
assert same, "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
