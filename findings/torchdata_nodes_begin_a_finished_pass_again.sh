#!/usr/bin/env bash
# torchdata 0.11.0: its two loaders disagree on what the state after the last item means. A StatefulDataLoader that takes it
# over gives nothing, so the epoch is over; a Loader of torchdata.nodes gives the whole pass again. A training that is
# saved after the last batch of an epoch, before the epoch is counted, trains it twice with the second and once with the
# first.
# Seen:
#   StatefulDataLoader: []
#   nodes.Loader: [0, 1, 2]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 torchdata==0.11.0
cd "$folder"
cat >shown.py <<'PY'
from torchdata.nodes import IterableWrapper, Loader
from torchdata.stateful_dataloader import StatefulDataLoader

MAKERS = {
    "StatefulDataLoader": lambda: StatefulDataLoader(range(3), batch_size=None),
    "nodes.Loader": lambda: Loader(IterableWrapper(range(3))),
}
seen = []
for name, make in MAKERS.items():
    loader = make()
    for _ in loader:
        state = loader.state_dict()
    loader = make()
    loader.load_state_dict(state)
    seen.append(list(loader))
    print(f"{name}: {seen[-1]}")
assert [[], [0, 1, 2]] == seen, f"the behaviour has changed: {seen}"
PY
venv/bin/python -W ignore shown.py
