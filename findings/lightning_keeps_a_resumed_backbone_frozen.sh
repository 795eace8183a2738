#!/usr/bin/env bash
# lightning 2.6.6: BackboneFinetuning freezes the backbone when a fit begins, and unfreezes it at the start of one epoch. A fit that
# is resumed after that epoch freezes it again, and that epoch does not come again: the optimizer has the parameters of
# the backbone back, but they get no gradient for the rest of the training. Nothing is logged, and the loss still falls.
# Every BaseFinetuning whose finetune_function acts at one epoch does the same.
# Seen, the backbone is unfrozen at epoch 1 of 4:
#   unbroken: the backbone is trained in epochs 1 2 3
#   resumed from the end of epoch 1: the backbone is trained in epochs (none)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 lightning==2.6.6
cd "$folder"
cat >shown.py <<'PY'
import logging

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from torch.utils.data import DataLoader

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Task(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = torch.nn.Linear(2, 2)
        self.head = torch.nn.Linear(2, 2)
        self.trained = []

    def training_step(self, batch, _):
        return self.head(self.backbone(batch)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), 0.01)

    def on_train_epoch_start(self):
        self.before = self.backbone.weight.detach().clone()

    def on_train_epoch_end(self):
        if not torch.equal(self.before, self.backbone.weight):
            self.trained.append(self.current_epoch)


def trained(resume=None):
    task = Task()
    saves = ModelCheckpoint("out", "{epoch}", save_top_k=-1, enable_version_counter=False)
    trainer = Trainer(
        max_epochs=4, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[BackboneFinetuning(unfreeze_backbone_at_epoch=1), saves],
    )
    trainer.fit(task, DataLoader(torch.ones(8, 2), 4), ckpt_path=resume, weights_only=False)
    return task.trained


seen = trained(), trained("out/epoch=1.ckpt")
for name, epochs in zip(("unbroken", "resumed from the end of epoch 1"), seen, strict=True):
    print(f"{name}: the backbone is trained in epochs", *(epochs or ["(none)"]))
assert ([1, 2, 3], []) == seen, "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py 2>/dev/null
