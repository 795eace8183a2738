#!/usr/bin/env bash
# accelerate 1.15.0: a prepared DataLoader has state_dict and load_state_dict, whatever it can do. Without
# use_stateful_dataloader state_dict fails with an AttributeError of an inner name, so that code that asks with hasattr takes it for
# a loader that can say its place. With use_stateful_dataloader the state at the last batch counts the pass as finished before
# that batch was trained on, and a loader that takes it over gives the whole pass again.
# Seen:
#   hasattr(loader, 'state_dict'): True
#   loader.state_dict(): AttributeError: 'DataLoader' object has no attribute 'dl_state_dict'
#   finished at each of 4 batches: [False, False, False, True]
#   after a state of the last batch: [[0], [1], [2], [3]]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 torchdata==0.11.0 accelerate==1.15.0
cd "$folder"
cat >shown.py <<'PY'
from accelerate import Accelerator, DataLoaderConfiguration
from torch.utils.data import DataLoader

plain = Accelerator(cpu=True).prepare(DataLoader(range(4)))
print(f"hasattr(loader, 'state_dict'): {hasattr(plain, 'state_dict')}")
try:
    plain.state_dict()
    failure = "none"
except AttributeError as error:
    failure = f"AttributeError: {error}"
print(f"loader.state_dict(): {failure}")

accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_stateful_dataloader=True))
loader = accelerator.prepare(DataLoader(range(4)))
states = [loader.state_dict() for _ in loader]
finished = [state["_iterator_finished"] for state in states]
print(f"finished at each of 4 batches: {finished}")
loader = accelerator.prepare(DataLoader(range(4)))
loader.load_state_dict(states[-1])
again = [batch.tolist() for batch in loader]
print(f"after a state of the last batch: {again}")
assert "dl_state_dict" in failure, "the behaviour has changed"
assert [False, False, False, True] == finished, "the behaviour has changed"
assert [[0], [1], [2], [3]] == again, "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
