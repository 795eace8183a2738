"""The state is taken once per moment, however many callbacks save; and what each resumes from is its own."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from checkpointer_lightning import CheckpointCallback, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from tiny import Model, files, fit, loader, quiet, step_of

from checkpointer import CheckpointManager, EverySteps, KeepAll, KeepBest, Policy

pytestmark = quiet


class Counting(Model):
    """Notes at which step it was asked for its state."""

    def __init__(self, **kw: Any) -> None:
        super().__init__(**kw)
        self.dumps: list[int] = []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        self.dumps.append(self.global_step)


class Plugin(TorchCheckpointIO):
    """Not Lightning's own: it writes by itself, to a path."""


@pytest.mark.parametrize("plugins", [[], [Plugin()], [AsyncCheckpointIO()]], ids=["plain", "plugin", "background"])
def test_70_callbacks_that_save_together_share_one_dump(tmp_path: Path, plugins: list[Any]) -> None:
    """In one directory or in two, of both kinds."""
    every = Policy(EverySteps(4), [KeepAll()], name="{step}")
    callbacks = [
        ModelCheckpoint(tmp_path / "a", "best", monitor="val_loss", save_last=True),
        ModelCheckpoint(tmp_path / "b", "{step}", save_top_k=-1),
        CheckpointCallback(tmp_path / "c", Policy(EverySteps(2), [KeepAll()], name="{step}")),
        CheckpointCallback(tmp_path / "a", every),
    ]
    model = Counting()
    fit(callbacks, model=model, max_epochs=2, plugins=plugins)
    # Batch ends and epoch ends are moments of their own; at a batch's end two callbacks save, at an epoch's end two.
    assert [2, 4, 4, 6, 8, 8] == model.dumps
    assert ["step=4.ckpt", "step=8.ckpt"] == files(tmp_path / "b")
    for name in files(tmp_path / "c"):
        state = torch.load(tmp_path / "c" / name, weights_only=True)
        assert int(name[len("step=") : -len(".ckpt")]) == state["global_step"]


def test_a_resume_from_anothers_file_knows_what_this_one_has_saved(tmp_path: Path) -> None:
    """The first callback's file was written before the second had saved that step: it is neither lost nor due anew."""

    def pair() -> list[Any]:
        policy = Policy(EverySteps(3), [KeepBest(2, "val_loss", mode="min")], name="{step}")
        always = Policy(EverySteps(3), [KeepAll()], name="{step}")
        return [CheckpointCallback(tmp_path / "first", always), CheckpointCallback(tmp_path / "second", policy)]

    options: dict[str, Any] = {"val_check_interval": 3, "check_val_every_n_epoch": None}
    fit(pair(), max_steps=6, model=Model([2.0, 1.0]), **options)
    assert ["step=3.ckpt", "step=6.ckpt"] == files(tmp_path / "second")
    again = pair()
    fit(again, max_steps=8, resume=tmp_path / "first/step=6.ckpt", model=Model([2.0, 1.0]), **options)
    assert ["step=3.ckpt", "step=6.ckpt"] == files(tmp_path / "second")
    assert () == CheckpointManager(tmp_path / "second").session.manifest.abandoned
    assert {3: 2.0, 6: 1.0} == {step_of(path): score for path, score in again[1].best_k_models.items()}


def test_each_file_holds_the_state_of_its_own_callback_as_saved(tmp_path: Path) -> None:
    """A step that is in a file is not due again after a resume from it, whichever callback wrote it."""

    def pair() -> list[Any]:
        return [ModelCheckpoint(tmp_path / name, "{step}", every_n_train_steps=2, save_top_k=-1) for name in "ab"]

    fit(pair(), max_steps=2)
    for name in "ab":
        fit(pair(), max_steps=3, resume=tmp_path / name / "step=2.ckpt")
        assert ["step=2.ckpt"] == files(tmp_path / "a") == files(tmp_path / "b")


class Trained(pl.Trainer):
    """A Trainer that does something of its own when it saves."""

    saved: list[str]

    def save_checkpoint(self, filepath: Any, weights_only: Any = None, storage_options: Any = None) -> None:
        self.saved.append(Path(filepath).suffix)
        super().save_checkpoint(filepath, weights_only, storage_options)


def test_a_trainer_that_saves_in_a_way_of_its_own_is_asked_to(tmp_path: Path) -> None:
    """What it adds is not passed over for the sake of speed."""
    callback = ModelCheckpoint(tmp_path, "{step}")
    training = Trained(
        callbacks=[callback], max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    training.saved = []
    training.fit(Model(), loader(2), loader(1))
    assert 2 == len(training.saved)
    assert ["step=4.ckpt"] == files(tmp_path)


def test_67_no_second_copy_of_the_state_is_in_memory(tmp_path: Path) -> None:
    """The state streams: Lightning's own class pickles all of it into memory first."""

    class Large(Model):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("large", torch.zeros(4 << 20))

    peaks = {}
    for name, cls in (("theirs", pl.callbacks.ModelCheckpoint), ("ours", ModelCheckpoint)):
        callback = cls(tmp_path / name)
        tracemalloc.start()
        try:
            fit(callback, model=Large(), max_epochs=1)
            peaks[name] = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peaks["ours"] < (8 << 20) < (16 << 20) < peaks["theirs"]
