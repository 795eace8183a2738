#!/usr/bin/env bash
# torchdata 0.11.0: the state of a StatefulDataLoader that was taken after the last batch of a pass is another place with
# workers than without. The data is a stream that begins anew at its end, as a second epoch needs. Without workers a
# loader that takes the state over gives nothing, which is right; with one worker it gives the whole pass again, because a
# worker always asks for one batch more after a restore. A training that was saved at the end of an epoch and is resumed
# trains that epoch twice, without a word.
# Seen:
#   0 workers: []
#   1 worker: [[0, 1], [2, 3], [4]]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 torchdata==0.11.0
cd "$folder"
cat >shown.py <<'PY'
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader


class Stream(IterableDataset):
    def __init__(self):
        self.place = 0

    def __iter__(self):
        while self.place < 5:
            self.place += 1
            yield self.place - 1
        self.place = 0

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


def new_loader(workers):
    return StatefulDataLoader(Stream(), batch_size=2, num_workers=workers)


if __name__ == "__main__":
    seen = []
    for workers in (0, 1):
        loader = new_loader(workers)
        for _ in loader:
            state = loader.state_dict()
        loader = new_loader(workers)
        loader.load_state_dict(state)
        seen.append([batch.tolist() for batch in loader])
        print(f"{workers} worker{'' if workers == 1 else 's'}: {seen[-1]}")
    assert [[], [[0, 1], [2, 3], [4]]] == seen, f"the behaviour has changed: {seen}"
PY
venv/bin/python -W ignore shown.py
