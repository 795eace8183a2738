"""Where Lightning's class loses data or misleads, and the drop-in does not. Each test fails with Lightning's class.

Set ``CHECKPOINTER_WITH_THEIRS=1`` to see that: the tests then run with Lightning's own.
"""

from __future__ import annotations

import os
import shutil
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from checkpointer_lightning import ModelCheckpoint as Ours
from lightning.pytorch.callbacks import ModelCheckpoint as Theirs
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from tiny import BATCHES, Model, files, fit, quiet, step_of

from checkpointer import CheckpointerWarning, CheckpointManager
from checkpointer.testing import FakeClock

ModelCheckpoint: Any = Theirs if os.environ.get("CHECKPOINTER_WITH_THEIRS") else Ours

pytestmark = quiet


def records(directory: Path) -> list[Any]:
    """Return what the newest run has in a directory."""
    return list(CheckpointManager(directory).records)


class StopError(Exception):
    """A crash at which no rescue is possible."""


class Crashing(Model):
    """Breaks before a step."""

    def __init__(self, step: int, **kw: Any) -> None:
        super().__init__(**kw)
        self.step = step

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.global_step == self.step:
            raise StopError


def crash(callback: Any, step: int, **kw: Any) -> None:
    """Train until a crash."""
    with pytest.raises(StopError):
        fit(callback, model=Crashing(step), **kw)


# Ranking


def test_06_a_diverged_score_is_not_unbeatable(tmp_path: Path) -> None:
    """A loss of minus infinity is a broken run, not the best of all."""
    callback = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss")
    fit(callback, model=Model([float("-inf"), 3.0, 2.0, 4.0, 5.0]))
    assert 2.0 == callback.best_model_score


def test_07_a_metric_that_is_missing_does_not_end_the_run(tmp_path: Path) -> None:
    """It is said once; what needs no metric is saved."""
    callback = ModelCheckpoint(dirpath=tmp_path, monitor="val_los", save_last=True)
    with pytest.warns(UserWarning, match=r"metric 'val_los' was not reported at step 4 \(have: train_loss, val_loss\)"):
        fit(callback)
    assert 5 * BATCHES == step_of(tmp_path / "last.ckpt")


# Triggers


def test_19_a_time_interval_goes_on_over_restarts(tmp_path: Path) -> None:
    """Three runs that are each shorter than the interval do save."""
    interval = timedelta(seconds=600)
    clock = FakeClock(1000.0)
    for _ in range(3):
        callback = ModelCheckpoint(dirpath=tmp_path, train_time_interval=interval)
        callback._clock = clock
        callback_crash(callback)
        clock.advance(400)
    assert [] != files(tmp_path)


def callback_crash(callback: Any) -> None:
    """Train two steps, and crash."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        crash(callback, 2)


def test_20_a_step_is_saved_though_its_metric_comes_later(tmp_path: Path) -> None:
    """A crash before the first validation leaves the newest step under last."""
    crash(ModelCheckpoint(dirpath=tmp_path, monitor="val_loss", every_n_train_steps=1, save_last=True), 3)
    assert 3 == step_of(tmp_path / "last.ckpt")


def test_21_no_score_stands_beside_weights_of_another_step(tmp_path: Path) -> None:
    """What is ranked was validated: the names say the scores of their own steps."""
    callback = ModelCheckpoint(
        dirpath=tmp_path, monitor="val_loss", every_n_train_steps=1, save_top_k=3, filename="{step}-{val_loss:.0f}"
    )
    fit(callback, val_check_interval=2, max_epochs=2, model=Model([9.0, 8.0, 7.0, 6.0]))
    assert ["step=4-val_loss=8.ckpt", "step=6-val_loss=7.ckpt", "step=8-val_loss=6.ckpt"] == files(tmp_path)


def test_21_a_training_that_stops_within_an_epoch_ranks_no_old_score(tmp_path: Path) -> None:
    """The last step was not validated, so it has no score."""
    callback = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss", save_top_k=2, filename="{step}")
    fit(callback, max_steps=6)
    assert {str(tmp_path / "step=4.ckpt"): 5.0} == callback.best_k_models


class Manual(Model):
    """Steps its optimizer by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        loss = self.layer(batch).pow(2).mean()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


def test_22_a_time_interval_works_in_manual_optimization(tmp_path: Path) -> None:
    """As it does in automatic."""
    fit(
        ModelCheckpoint(dirpath=tmp_path, train_time_interval=timedelta(0), save_top_k=-1), model=Manual(), max_epochs=1
    )
    assert BATCHES == len(files(tmp_path))


# last


@pytest.mark.parametrize("how", [True, "link"])
def test_28_last_is_the_newest_though_another_is_best(tmp_path: Path, how: Any) -> None:
    """Three epochs that get worse: last holds the third."""
    callback = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss", save_last=how, filename="{epoch}")
    fit(callback, model=Model([1.0, 2.0, 3.0]), max_epochs=3)
    assert 3 * BATCHES == step_of(tmp_path / "last.ckpt")
    assert BATCHES == step_of(callback.best_model_path)


def test_30_last_is_there_at_each_due_point_without_top_k(tmp_path: Path) -> None:
    """Not only at the end, which a crash prevents."""
    crash(ModelCheckpoint(dirpath=tmp_path, save_top_k=0, save_last=True), 10)
    assert ["last.ckpt"] == files(tmp_path)
    assert 8 == step_of(tmp_path / "last.ckpt")


def test_32_best_model_path_names_a_file_that_is_there_after_a_failed_save(tmp_path: Path) -> None:
    """And so does what a crash leaves of the ranking."""
    callback = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss")

    class Full(Model):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            super().on_save_checkpoint(checkpoint)
            if self.global_step > BATCHES:
                raise OSError(28, "No space left on device")

    with pytest.raises((OSError, RuntimeError), match="No space left on device"):
        fit(callback, model=Full([3.0, 2.0]))
    assert Path(callback.best_model_path).exists()
    assert [callback.best_model_path] == list(callback.best_k_models)


def test_35_a_template_for_last_is_found_again(tmp_path: Path) -> None:
    """The alias has a fixed name, what of the template is fixed, and ``"last"`` finds it."""
    callback = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    callback.CHECKPOINT_NAME_LAST = "{epoch}-newest"
    fit(callback, max_epochs=2)
    again = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    again.CHECKPOINT_NAME_LAST = "{epoch}-newest"
    training = fit(again, max_epochs=2, resume="last")
    assert str(tmp_path / "newest.ckpt") == training.ckpt_path


def test_36_records_say_what_last_is_and_not_its_name(tmp_path: Path) -> None:
    """A newer file called lasting-model is not it."""
    fit(ModelCheckpoint(dirpath=tmp_path, save_last=True), max_epochs=1)
    fit(None, max_epochs=1, enable_checkpointing=False).save_checkpoint(tmp_path / "lasting-model.ckpt")
    training = fit(ModelCheckpoint(dirpath=tmp_path, save_last=True), max_epochs=1, resume="last")
    assert str(tmp_path / "last.ckpt") == training.ckpt_path


def test_37_two_callbacks_in_one_directory_each_have_the_newest_as_last(tmp_path: Path) -> None:
    """Whichever of the two files is taken, it is where the training was."""
    pair = [
        ModelCheckpoint(dirpath=tmp_path, monitor="val_loss", save_last=True),
        ModelCheckpoint(dirpath=tmp_path, monitor="val_loss", mode="max", save_last=True),
    ]
    fit(pair, model=Model([1.0, 2.0, 3.0]), max_epochs=3)
    assert [12, 12] == [step_of(callback.last_model_path) for callback in pair]


# Names


def test_41_emptied_folders_go(tmp_path: Path) -> None:
    """A metric with a slash makes folders; one whose file is retired goes with it."""

    class Slash(Model):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/loss", torch.tensor(self.losses[self.validations]))

    callback = ModelCheckpoint(dirpath=tmp_path, monitor="val/loss", filename="{epoch}-{val/loss:.0f}")
    fit(callback, model=Slash())
    assert ["epoch=3-val"] == sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("."))


# Deletion, resume, state


def test_51_a_failing_delete_does_not_end_the_training(tmp_path: Path) -> None:
    """It is warned of, and the training goes on."""
    callback = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss", filename="{epoch}")

    class Blocking(Model):
        def on_train_epoch_start(self) -> None:
            path = tmp_path / "epoch=0.ckpt"
            if self.current_epoch == 1:
                # A folder that is not empty cannot be unlinked.
                path.unlink()
                path.mkdir()
                os.chmod(path, 0o755)
                (path / "x").mkdir()
                os.system(f"chattr +i {path} 2>/dev/null")

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(callback, model=Blocking(), max_epochs=3)
    finally:
        os.system(f"chattr -i {tmp_path / 'epoch=0.ckpt'} 2>/dev/null")
    assert str(tmp_path / "epoch=1.ckpt") == callback.best_model_path


def test_54_a_folder_that_was_moved_has_its_ranking_with_it(tmp_path: Path) -> None:
    """The true best is still the best, and last is still last."""
    arguments = {"monitor": "val_loss", "save_last": True}
    fit(ModelCheckpoint(dirpath=tmp_path / "old", **arguments), model=Model([1.0, 5.0]), max_epochs=2)
    shutil.move(tmp_path / "old", tmp_path / "new")
    callback = ModelCheckpoint(dirpath=tmp_path / "new", **arguments)
    fit(callback, model=Model([1.0, 5.0, 3.0]), max_epochs=3, resume=tmp_path / "new/last.ckpt")
    assert 1.0 == callback.best_model_score
    assert ["epoch=0-step=4.ckpt", "last.ckpt"] == files(tmp_path / "new")


def test_55_other_triggers_keep_the_ranking(tmp_path: Path) -> None:
    """Which epochs are saved has nothing to do with which was best."""
    fit(ModelCheckpoint(dirpath=tmp_path, monitor="val_loss", save_last=True), model=Model([1.0, 5.0]), max_epochs=2)
    callback = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss", save_last=True, every_n_epochs=2)
    fit(callback, model=Model([1.0, 5.0, 3.0, 4.0]), max_epochs=4, resume=tmp_path / "last.ckpt")
    assert 1.0 == callback.best_model_score
    assert ["epoch=0-step=4.ckpt", "last.ckpt"] == files(tmp_path)


def test_56_two_callbacks_that_rank_the_same_are_welcome(tmp_path: Path) -> None:
    """In two directories, with two names."""
    pair = [ModelCheckpoint(dirpath=tmp_path / name, filename=name, monitor="val_loss") for name in "ab"]
    fit(pair, max_epochs=2)
    assert ["a/a.ckpt", "b/b.ckpt"] == files(tmp_path)


def test_58_a_resume_from_a_best_file_leaves_no_stale_last(tmp_path: Path) -> None:
    """There is one last, and it is the newest."""
    callback = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss", save_last=True)
    fit(callback, model=Model([1.0, 2.0]), max_epochs=2)
    again = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss", save_last=True)
    fit(again, model=Model([1.0, 2.0, 3.0]), max_epochs=3, resume=callback.best_model_path)
    assert 12 == step_of(tmp_path / "last.ckpt")
    assert not (tmp_path / "last-v1.ckpt").exists()


def test_62_without_last_the_newest_is_found(tmp_path: Path) -> None:
    """``ckpt_path="last"`` does not start over beside whole checkpoints."""
    fit(ModelCheckpoint(dirpath=tmp_path), max_epochs=2)
    training = fit(ModelCheckpoint(dirpath=tmp_path), max_epochs=2, resume="last")
    assert str(tmp_path / "epoch=1-step=8.ckpt") == training.ckpt_path


def test_63_a_corrupt_last_is_passed_over(tmp_path: Path) -> None:
    """The next newest is whole, and is taken; why is said."""
    fit(ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, save_last=True), max_epochs=2)
    broken = tmp_path / "last.ckpt"
    broken.write_bytes(broken.read_bytes()[:-100] + b"x" * 100)
    with pytest.warns(UserWarning, match=r"restored epoch=0-step=4.ckpt \(step 4\), because newer or better ones"):
        training = fit(ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, save_last=True), max_epochs=2, resume="last")
    assert 8 == training.global_step


# Writing and exceptions


def test_70_a_step_is_dumped_once_however_many_files_name_it(tmp_path: Path) -> None:
    """Top k and last are one payload."""
    dumps: list[int] = []

    class Counting(Model):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            super().on_save_checkpoint(checkpoint)
            dumps.append(self.global_step)

    fit(ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, save_last=True), model=Counting(), max_epochs=3)
    assert [4, 8, 12] == dumps


class Slow(TorchCheckpointIO):
    """A disk that takes its time."""

    def save_checkpoint(self, *args: Any, **kw: Any) -> None:
        time.sleep(0.05)
        super().save_checkpoint(*args, **kw)


def test_72_a_plugin_that_writes_in_the_background_keeps_k(tmp_path: Path) -> None:
    """Nothing is published before it is there, so nothing is forgotten."""
    callback = ModelCheckpoint(dirpath=tmp_path, save_last="link")
    fit(callback, plugins=[AsyncCheckpointIO(Slow())])
    assert ["epoch=4-step=20.ckpt", "last.ckpt"] == files(tmp_path)
    assert 20 == step_of(tmp_path / "last.ckpt")


def test_76_an_exception_does_not_overwrite_the_best(tmp_path: Path) -> None:
    """The save of the moment has a name of its own."""
    callback = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss", filename="best", save_on_exception=True)
    with pytest.raises(ZeroDivisionError, match="the training breaks"):
        fit(callback, model=Model([1.0, 2.0], fails_at=10))
    assert 4 == step_of(tmp_path / "best.ckpt")
    assert 10 == step_of(tmp_path / "rescue-step=10.ckpt")


def test_77_an_exception_outside_a_training_saves_nothing(tmp_path: Path) -> None:
    """A validation has nothing new to save."""

    class Broken(Model):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise ZeroDivisionError("the validation breaks")

    training = fit(ModelCheckpoint(dirpath=tmp_path, save_on_exception=True, every_n_epochs=0), max_epochs=1)
    with pytest.raises(ZeroDivisionError, match="the validation breaks"):
        training.validate(Broken(), torch.ones(1, 2, 2))
    assert [] == files(tmp_path)


def test_17_a_dev_run_leaves_no_last(tmp_path: Path) -> None:
    """Lightning's writes one when it ends."""
    fit(ModelCheckpoint(dirpath=tmp_path, save_last=True), fast_dev_run=True)
    assert [] == files(tmp_path)


# Trainings, one after another


def test_57_what_lies_beyond_the_resumed_step_is_apart_from_saved(tmp_path: Path) -> None:
    """Later files of the timeline that was left stay, listed as abandoned and never ranked."""
    arguments = {"dirpath": tmp_path, "monitor": "val_loss", "save_top_k": 2, "filename": "{epoch}"}
    fit(ModelCheckpoint(**arguments), model=Model([3.0, 1.0]), max_epochs=2)
    callback = ModelCheckpoint(**arguments)
    fit(callback, model=Model([3.0, 2.0]), max_epochs=2, resume=tmp_path / "epoch=0.ckpt")
    assert ["epoch=1.ckpt"] == [record.name for record in CheckpointManager(tmp_path).session.manifest.abandoned]
    assert str(tmp_path / "epoch=1-v1.ckpt") == callback.best_model_path


def test_59_another_training_begins_with_no_ranking(tmp_path: Path) -> None:
    """The second training of one callback, by another Trainer, is not measured by the first."""
    callback = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss", filename="{epoch}")
    fit(callback, model=Model([1.0]), max_epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(callback, model=Model([5.0]), max_epochs=1)
    assert ["epoch=0-v1.ckpt", "epoch=0.ckpt"] == files(tmp_path)
    assert 5.0 == callback.best_model_score


def test_66_a_kill_leaves_nothing_half_written_wherever_tmpdir_is(tmp_path: Path) -> None:
    """What Lightning writes, it writes to a staged path: the name appears with the whole file behind it."""
    seen: list[str] = []

    class Watching(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            seen.append(os.path.relpath(path, tmp_path))
            super().save_checkpoint(checkpoint, path, storage_options)

    fit(ModelCheckpoint(dirpath=tmp_path, filename="model", save_last=True), plugins=[Watching()], max_epochs=2)
    assert [] == [path for path in seen if not path.startswith(".checkpointer/staging/")]
    assert 8 == step_of(tmp_path / "model.ckpt")


def test_66_a_plugin_writes_to_a_staged_path_and_removes_nothing(tmp_path: Path) -> None:
    """Retention removes the files, and an override of the callback's ``_remove_checkpoint`` gets their paths."""
    by_plugin: list[str] = []
    by_callback: list[str] = []

    class Plugin(TorchCheckpointIO):
        def remove_checkpoint(self, path: Any) -> None:
            by_plugin.append(os.path.relpath(path, tmp_path))
            super().remove_checkpoint(path)

    class Watching(ModelCheckpoint):
        def _remove_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
            by_callback.append(os.path.relpath(filepath, tmp_path))
            super()._remove_checkpoint(trainer, filepath)

    fit(Watching(dirpath=tmp_path, filename="{epoch}"), plugins=[Plugin()], max_epochs=3)
    assert [] == by_plugin
    assert ["epoch=0.ckpt", "epoch=1.ckpt"] == by_callback
    assert ["epoch=2.ckpt"] == files(tmp_path)


class Removing(pl.Callback):
    """Removes the whole directory after the second epoch."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Before anything of the third epoch is saved."""
        if trainer.current_epoch == 2:
            shutil.rmtree(self.directory)


def test_the_best_path_names_no_file_of_a_directory_that_was_removed(tmp_path: Path) -> None:
    """In Lightning the two best stay the two best, and nothing worse is saved ever after."""
    directory = tmp_path / "checkpoints"
    callback = Ours(directory, "{epoch}", monitor="val_loss", save_top_k=2, save_last=True)
    model = Model([0.1, 0.2, 0.9, 0.8])
    with pytest.warns(CheckpointerWarning, match="are gone, .* do not count; .*there is no best one now"):
        fit([callback, Removing(directory)], model=model, max_epochs=4)
    assert ["epoch=2.ckpt", "epoch=3.ckpt", "last.ckpt"] == files(directory)
    assert str(directory / "epoch=3.ckpt") == callback.best_model_path
    assert {str(directory / f"epoch={epoch}.ckpt") for epoch in (2, 3)} == {*callback.best_k_models}
