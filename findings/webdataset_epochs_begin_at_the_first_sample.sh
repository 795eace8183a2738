#!/usr/bin/env bash
# webdataset 1.0.2: with_epoch(n) cuts each pass off after n samples, and the next pass begins with the first sample again. If n is
# less than the data has, an epoch does not go on where the last one stopped: samples beyond the n-th are never trained,
# if the shards are not shuffled. In a DataLoader each worker counts for itself: 2 workers give 2 n samples.
# Seen:
#   with_epoch(8) of 20 samples, 3 epochs: 24 samples, 8 of them different
#   2 workers: 16 samples an epoch
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 webdataset==1.0.2
cd "$folder"
cat >shown.py <<'PY'
import webdataset as wds


def number(sample):
    return int(sample["cls"])


if __name__ == "__main__":
    for shard in range(2):
        with wds.TarWriter(f"shard{shard}.tar") as writer:
            for place in range(10):
                writer.write({"__key__": f"{shard}{place}", "cls": f"{shard}{place}".encode()})
    data = wds.WebDataset("shard{0..1}.tar", shardshuffle=False).decode().map(number).with_epoch(8)
    seen = [one for _ in range(3) for one in data]
    print(f"with_epoch(8) of 20 samples, 3 epochs: {len(seen)} samples, {len(set(seen))} of them different")
    in_workers = list(wds.WebLoader(data, batch_size=None, num_workers=2))
    print(f"2 workers: {len(in_workers)} samples an epoch")
    assert (24, 8, 16) == (len(seen), len(set(seen)), len(in_workers)), "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
