"""Copies of a callback, pickled or deep, made at any time: launchers and tuners make them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpointer_lightning import CheckpointCallback, ModelCheckpoint
from tiny import Model, files, fit, quiet, step_of

from checkpointer import EveryEpochs, KeepBest, KeepLast, Policy

pytestmark = quiet

POLICY = Policy(EveryEpochs(1), [KeepBest(1, "val_loss", mode="min"), KeepLast(1)], last="link")


def make(kind: str, directory: Path) -> Any:
    """Return a callback of one of the two kinds."""
    if kind == "policy":
        return CheckpointCallback(directory, POLICY)
    return ModelCheckpoint(directory, monitor="val_loss", save_last="link")


@pytest.mark.parametrize("copied", [lambda callback: pickle.loads(pickle.dumps(callback)), copy.deepcopy])
@pytest.mark.parametrize("kind", ["drop-in", "policy"])
def test_a_copy_is_as_good_as_what_it_was_made_of(tmp_path: Path, kind: str, copied: Callable[[Any], Any]) -> None:
    """Before a training, within it and after it; the copy knows what the first knew, and disturbs nothing."""
    within: list[Any] = []

    class Copying(Model):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            within.append(copied(self.trainer.checkpoint_callback))

    callback = copied(make(kind, tmp_path))
    fit(callback, model=Copying(), max_epochs=2)
    assert ["epoch=1-step=8.ckpt", "last.ckpt"] == files(tmp_path)
    assert 8 == len(within)
    after = copied(callback)
    for name in ("best_model_path", "last_model_path", "best_model_score", "state_key", "dirpath", "monitor"):
        assert getattr(callback, name) == getattr(after, name), name
    assert callback.state_dict() == after.state_dict()
    assert str(tmp_path / "epoch=0-step=4.ckpt") == within[-1].best_model_path
    # Each of them goes on with the run.
    fit(within[-1], max_epochs=3, resume="last")
    fit(after, max_epochs=4, resume="last")
    assert 16 == step_of(after.last_model_path)
    assert ["epoch=3-step=16.ckpt", "last.ckpt"] == files(tmp_path)
