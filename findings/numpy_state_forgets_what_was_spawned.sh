#!/usr/bin/env bash
# numpy 2.4.6: bit_generator.state is documented as the state of a generator. It does not say how many generators spawn() has
# given, so after a restore spawn() gives the first ones again: workers of a resumed program draw the numbers that earlier
# workers drew. If the generator was made without a seed, spawn() gives others at each restore. pickle keeps the count.
# Seen:
#   random() goes on: True
#   spawn() goes on: False begins again: True
#   spawn() goes on in a generator that was made without a seed: False
#   spawn() goes on after pickle: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6
cd "$folder"
cat >shown.py <<'PY'
import pickle

import numpy as np

before = np.random.default_rng(1)
first, _ = before.spawn(2)
state, pickled = before.bit_generator.state, pickle.dumps(before)
third = before.spawn(1)[0].random()
after = np.random.default_rng(1)
after.bit_generator.state = state
same_numbers = before.random() == after.random()
restored = after.spawn(1)[0].random()
unseeded = np.random.default_rng()
unseeded.bit_generator.state = state
seen = [same_numbers, restored == third, restored == first.random(), unseeded.spawn(1)[0].random() == third]
seen.append(pickle.loads(pickled).spawn(1)[0].random() == third)
print("random() goes on:", seen[0])
print("spawn() goes on:", seen[1], "begins again:", seen[2])
print("spawn() goes on in a generator that was made without a seed:", seen[3])
print("spawn() goes on after pickle:", seen[4])
assert [True, False, True, False, True] == seen, f"the behaviour has changed: {seen}"
PY
venv/bin/python -W ignore shown.py
