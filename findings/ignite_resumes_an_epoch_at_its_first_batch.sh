#!/usr/bin/env bash
# pytorch-ignite 0.5.5: the state of an Engine has its iteration, and an Engine that loads it goes on with the next iteration and
# ends the epoch after the right number of them. But it iterates over the data anew: the iterations that are left of the epoch
# get the first batches again, and the last batches are never trained. No warning. DeterministicEngine skips to the place.
# Seen (saved at iteration 7, epochs of 5 batches):
#   Engine: iterations 8, 9, 10 of epoch 2 train batches 0, 1, 2
#   DeterministicEngine: iterations 8, 9, 10 of epoch 2 train batches 2, 3, 4
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 pytorch-ignite==0.5.5
cd "$folder"
cat >shown.py <<'PY'
import logging

from ignite.engine import DeterministicEngine, Engine, Events
from torch.utils.data import DataLoader

logging.disable()


class Killed(Exception):
    pass


def resumed(make):
    """Train until iteration 7, and go on from its state in a new engine."""
    loader = DataLoader(range(5), batch_size=None)
    states, trained = [], []
    first = make(lambda engine, batch: None)

    @first.on(Events.ITERATION_COMPLETED(once=7))
    def save():
        states.append(first.state_dict())
        raise Killed

    try:
        first.run(loader, max_epochs=2)
    except Killed:
        pass
    second = make(lambda engine, batch: trained.append((engine.state.iteration, int(batch))))
    second.load_state_dict(states[0])
    second.run(loader, max_epochs=2)
    iterations, batches = zip(*trained)
    print(f"{make.__name__}: iterations", *iterations, "of epoch 2 train batches", *batches)
    return trained


assert [(8, 0), (9, 1), (10, 2)] == resumed(Engine), "the behaviour has changed"
assert [(8, 2), (9, 3), (10, 4)] == resumed(DeterministicEngine), "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
