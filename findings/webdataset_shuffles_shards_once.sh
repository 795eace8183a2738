#!/usr/bin/env bash
# webdataset 1.0.2: shardshuffle=N orders the shards by a generator that each pass makes anew from one seed, so every epoch has
# the same order of shards. detshuffle=True counts the passes and changes the order, but the count is an attribute of the
# stage: the workers of a DataLoader start anew for each epoch with a copy of the stage that has counted nothing, so they have
# the same order in each epoch too. Only with persistent_workers=True the order changes.
# Seen:
#   shardshuffle=8: shards in three epochs 24075163 24075163 24075163
#   detshuffle=True: shards in three epochs 24075163 07621435 34612750
#   detshuffle=True, 1 worker: shards in three epochs 24075163 24075163 24075163
#   detshuffle=True, 1 persistent worker: shards in three epochs 24075163 07621435 34612750
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 webdataset==1.0.2
cd "$folder"
cat >shown.py <<'PY'
import webdataset as wds

SHARDS = 8


def number(sample):
    return int(sample["cls"])


def epochs(workers=None, **options):
    data = wds.WebDataset(f"shard{{0..{SHARDS - 1}}}.tar", shardshuffle=SHARDS, seed=1, **options).decode().map(number)
    if workers is not None:
        data = wds.WebLoader(data, batch_size=None, num_workers=1, persistent_workers=workers == "persistent")
    return ["".join(map(str, data)) for _ in range(3)]


if __name__ == "__main__":
    for shard in range(SHARDS):
        with wds.TarWriter(f"shard{shard}.tar") as writer:
            writer.write({"__key__": str(shard), "cls": str(shard).encode()})
    seen = {
        "shardshuffle=8": epochs(),
        "detshuffle=True": epochs(detshuffle=True),
        "detshuffle=True, 1 worker": epochs("fresh", detshuffle=True),
        "detshuffle=True, 1 persistent worker": epochs("persistent", detshuffle=True),
    }
    for name, orders in seen.items():
        print(f"{name}: shards in three epochs", *orders)
    assert [1, 3, 1, 3] == [len(set(orders)) for orders in seen.values()], "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
