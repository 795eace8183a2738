#!/usr/bin/env bash
# albumentations 2.0.8: each transform has generators of its own, which are made with it. Every worker of a DataLoader gets a copy of
# them, and nothing seeds the copies: neither the seeds that a DataLoader gives to its workers nor torch.manual_seed reach them.
# So two workers draw the same augmentations, and each epoch, with new workers, repeats those of the epoch before. With
# persistent_workers=True the epochs differ, and the workers do not. A resumed process draws others again.
# Seen (four images, two workers, three epochs):
#   albumentations: the workers draw the same: True, different epochs: 1
#   albumentations, persistent workers: the workers draw the same: True, different epochs: 3
#   numpy's global generator: the workers draw the same: False, different epochs: 3
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 albumentations==2.0.8
cd "$folder"
cat >shown.py <<'PY'
import albumentations as A
import numpy as np
from torch.utils.data import DataLoader, Dataset

IMAGE = np.full((8, 8, 3), 100, np.uint8)


class Augmented(Dataset):
    def __init__(self):
        self.transform = A.Compose([A.RandomBrightnessContrast(p=1)])

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return int(self.transform(image=IMAGE)["image"].sum())


class Numpy(Augmented):
    def __getitem__(self, index):
        return np.random.randint(10**9)


def seen(name, data, **options):
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork", **options)
    epochs = [tuple(int(drawn) for drawn in loader) for _ in range(3)]  # One by each worker in turn.
    alike, different = all(epoch[0::2] == epoch[1::2] for epoch in epochs), len(set(epochs))
    print(f"{name}: the workers draw the same: {alike}, different epochs: {different}")
    return alike, different


found = [
    seen("albumentations", Augmented()),
    seen("albumentations, persistent workers", Augmented(), persistent_workers=True),
    seen("numpy's global generator", Numpy()),
]
assert [(True, 1), (True, 3), (False, 3)] == found, "the behaviour has changed"
PY
NO_ALBUMENTATIONS_UPDATE=1 venv/bin/python -W ignore shown.py
