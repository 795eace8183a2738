#!/usr/bin/env bash
# albumentations 2.0.8: Compose(seed=) gives the same seed to the generator of each transform. So the transforms draw the same numbers:
# with seed= two flips of probability 0.5 happen together or not at all, and an image is never flipped in one direction alone.
# Without seed= they are independent. The seed that makes augmentations reproducible makes half of them impossible.
# Seen (400 draws, any of 20 seeds):
#   HorizontalFlip(p=0.5), VerticalFlip(p=0.5) without seed=: none, vertical, horizontal, both
#   with seed=: none, both
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 albumentations==2.0.8
cd "$folder"
cat >shown.py <<'PY'
import albumentations as A
import numpy as np

IMAGE = np.arange(4, dtype=np.uint8).reshape(2, 2, 1).repeat(3, axis=2)
NAMES = {0: "none", 2: "vertical", 1: "horizontal", 3: "both"}  # By what comes into the first corner.


def drawn(seed):
    flips = A.Compose([A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)], seed=seed)
    corners = {int(flips(image=IMAGE)["image"][0, 0, 0]) for _ in range(400)}
    return [name for corner, name in NAMES.items() if corner in corners]


without, seeded = drawn(None), {tuple(drawn(seed)) for seed in range(20)}
print(f"HorizontalFlip(p=0.5), VerticalFlip(p=0.5) without seed=: {', '.join(without)}")
print(f"with seed=: {'; '.join(', '.join(names) for names in seeded)}")
assert list(NAMES.values()) == without and {("none", "both")} == seeded, "the behaviour has changed"
PY
NO_ALBUMENTATIONS_UPDATE=1 venv/bin/python -W ignore shown.py
