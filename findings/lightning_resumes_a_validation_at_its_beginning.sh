#!/usr/bin/env bash
# lightning 2.6.6: ModelCheckpoint(save_on_exception=True) saves when an exception ends a validation, and the checkpoint has the
# number of batches that the validation had finished. trainer.fit(ckpt_path=...) runs this validation again. It iterates over
# the loader from its first batch, and ends earlier by the saved number of batches. So the first batches run a second time, the
# last ones do not run, and Lightning logs the mean of what ran as the metric of the validation. Early stopping and the choice
# of the best checkpoint use it. One would expect all batches, or the missing ones and a mean over all.
# Seen (5 batches with the values 0 to 4; the third one raises; the first validation after the resume):
#   val_check_interval=0.5, without an exception: batches [0, 1, 2, 3, 4], metric 2.0
#   val_check_interval=0.5, resumed: batches [0, 1, 2], metric 1.0
#   val_check_interval=1.0, without an exception: batches [0, 1, 2, 3, 4], metric 2.0
#   val_check_interval=1.0, resumed: batches [0, 1, 2], metric 1.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 lightning==2.6.6
cd "$folder"
cat >shown.py <<'PY'
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader


class Model(LightningModule):
    def __init__(self, raises_at=None):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.raises_at = raises_at
        self.validations = []

    def training_step(self, batch, index):
        return self.layer(batch).sum()

    def on_validation_epoch_start(self):
        self.batches = []

    def validation_step(self, batch, index):
        if index == self.raises_at:
            raise RuntimeError("interrupted")
        self.batches.append(index)
        self.log("metric", batch.mean())

    def on_validation_epoch_end(self):
        self.validations.append((self.batches, self.trainer.callback_metrics["metric"].item()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def first_validation(model, interval, folder, ckpt_path=None):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    saving = ModelCheckpoint(folder, save_on_exception=True)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", devices=1, val_check_interval=interval, callbacks=[saving], **quiet
    )
    values = DataLoader(torch.ones(4, 1)), DataLoader(torch.arange(5.0).reshape(5, 1))
    trainer.fit(model, *values, ckpt_path=ckpt_path)
    return model.validations[0]


for interval in (0.5, 1.0):
    whole = first_validation(Model(), interval, f"whole_{interval}")
    print(f"val_check_interval={interval}, without an exception: batches {whole[0]}, metric {whole[1]}")
    folder = f"ended_{interval}"
    try:
        first_validation(Model(raises_at=2), interval, folder)
    except RuntimeError as error:
        assert str(error) == "interrupted"
    (saved,) = Path(folder).iterdir()
    resumed = first_validation(Model(), interval, f"resumed_{interval}", ckpt_path=saved)
    print(f"val_check_interval={interval}, resumed: batches {resumed[0]}, metric {resumed[1]}")
    assert ([0, 1, 2, 3, 4], 2.0) == whole, f"the behaviour has changed: {whole}"
    assert ([0, 1, 2], 1.0) == resumed, f"the behaviour has changed: {resumed}"
PY
venv/bin/python -W ignore shown.py
