"""Lightning's own files are made records of: its format may change, so it writes them here."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support.commands import command
from tiny import BATCHES, Model, loader, quiet


@quiet
def test_adopt_reads_what_lightning_really_writes(tmp_path: Path) -> None:
    """Steps, epochs and scores, without unpickling; nothing is guessed from the names."""
    keep = ModelCheckpoint(tmp_path / "old", monitor="val_loss", save_top_k=2, filename="{epoch}", save_last=True)
    trainer = pl.Trainer(
        max_epochs=4, callbacks=[keep], logger=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu", num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(Model((5.0, 3.0, 4.0, 2.0)), loader(), loader(1))

    data = command("adopt", tmp_path / "old", "--json").data

    expected = [("epoch=1.ckpt", 2 * BATCHES, 1, 3.0), ("epoch=3.ckpt", 4 * BATCHES, 3, 2.0)]
    assert expected == [(r["name"], r["step"], r["epoch"], r["metrics"]["val_loss"]) for r in data["adopted"]]
    assert [True, True] == [record["epoch_end"] for record in data["adopted"]]
    assert ({}, {"last.ckpt": "epoch=3.ckpt"}) == (data["refused"], data["aliases"])
    path = command("best", tmp_path / "old", "--by", "val_loss", "--mode", "min").out.strip()
    assert torch.load(path, weights_only=True)["global_step"] == 4 * BATCHES
