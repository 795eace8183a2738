"""The composed policy in Lightning: what is reported, what is saved, and what a resume goes on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointer_lightning import CheckpointCallback
from tiny import BATCHES, Forked, Model, files, fit, is_at_least, quiet, step_of

from checkpointer import (
    AnyOf,
    CheckpointManager,
    EveryEpochs,
    EverySteps,
    KeepAll,
    KeepBest,
    KeepLast,
    OnImprovement,
    Policy,
    Record,
)

pytestmark = quiet

EVERYTHING = Policy(AnyOf(EveryEpochs(1), EverySteps(3)), [KeepAll()])
BEST_AND_LAST = Policy(
    EveryEpochs(1), [KeepBest(2, "val_loss", mode="min"), KeepLast(1)], name="{epoch}-{val_loss:.0f}", last="link"
)


def records(directory: Path, **kw: Any) -> tuple[Record, ...]:
    """Return what a run has in a directory."""
    return CheckpointManager(directory, **kw).records


def test_the_policy_decides(tmp_path: Path) -> None:
    """The best two by the validation of each epoch and the newest live; the link names the newest."""
    callback = CheckpointCallback(tmp_path, BEST_AND_LAST)
    fit(callback)
    expected = ["epoch=1-val_loss=3.ckpt", "epoch=3-val_loss=2.ckpt", "epoch=4-val_loss=9.ckpt", "last.ckpt"]
    assert expected == files(tmp_path)
    assert 5 * BATCHES == step_of(tmp_path / "last.ckpt")
    assert str(tmp_path / "epoch=3-val_loss=2.ckpt") == callback.best_model_path


def test_each_moment_is_reported_as_what_it_is(tmp_path: Path) -> None:
    """Within an epoch a step belongs to it; its last step ends it, and triggers count it once."""
    fit(CheckpointCallback(tmp_path, EVERYTHING), max_epochs=2)
    found = [(record.step, record.epoch, record.epoch_end) for record in records(tmp_path)]
    assert [(3, 0, False), (4, 0, True), (6, 1, False), (8, 1, True)] == found


def test_an_epoch_whose_last_step_is_saved_already_is_not_made_up_for_later(tmp_path: Path) -> None:
    """The step trigger takes the epoch's last step; the next epoch's first step owes nothing."""
    fit(CheckpointCallback(tmp_path, Policy(AnyOf(EveryEpochs(1), EverySteps(4)), [KeepAll()])), max_epochs=2)
    found = [(record.step, record.epoch_end) for record in records(tmp_path)]
    assert [(4, True), (8, True)] == found


def test_a_step_keeps_the_value_that_it_was_ranked_by(tmp_path: Path) -> None:
    """Over several epochs, though each epoch's last step is reported again with the mean of the epoch."""
    values = [5.0, 5.0, 5.0, 0.1, 5.0, 0.5, 5.0, 5.0, 3.0, 3.0, 3.0, 4.0]
    policy = Policy(AnyOf(EveryEpochs(1), EverySteps(2)), [KeepBest(3, "train_loss", mode="min")])
    fit(CheckpointCallback(tmp_path, policy), model=Forked(values), max_epochs=3)
    found = {record.step: round(record.metrics["train_loss"], 3) for record in records(tmp_path)}
    assert {4: 0.1, 6: 0.5, 10: 3.0} == found


def test_an_epoch_that_is_due_is_ranked_by_its_mean(tmp_path: Path) -> None:
    """No step was ranked before: a validation within the epoch's end only passed by."""
    policy = Policy(EveryEpochs(1), [KeepBest(1, "train_loss", mode="min")])
    fit(CheckpointCallback(tmp_path, policy), model=Forked([1.0, 2.0, 3.0, 6.0]), max_epochs=1)
    assert [3.0] == [record.metrics["train_loss"] for record in records(tmp_path)]


def test_a_validation_ranks_a_saved_step_anew(tmp_path: Path) -> None:
    """It measures under the name that the training's batches had."""

    class Same(Forked):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("train_loss", torch.tensor(7.0))

    policy = Policy(EverySteps(4), [KeepBest(1, "train_loss", mode="min")])
    fit(CheckpointCallback(tmp_path, policy), model=Same([1.0, 2.0, 3.0, 6.0]), max_epochs=1)
    assert [7.0] == [record.metrics["train_loss"] for record in records(tmp_path)]


def test_an_epoch_that_max_steps_cuts_short_has_not_ended(tmp_path: Path) -> None:
    """Lightning runs the hook of an epoch's end there too."""
    fit(CheckpointCallback(tmp_path, Policy(EveryEpochs(1), [KeepAll()])), max_steps=6)
    found = [(record.step, record.epoch_end, record.reason.split(";")[0]) for record in records(tmp_path)]
    assert [(4, True, "1 epoch finished, every epoch"), (6, False, "the training ends")] == found


def test_a_metric_counts_only_for_the_step_it_was_measured_at(tmp_path: Path) -> None:
    """Between validations the Trainer still shows the old score; what is saved there has none."""
    policy = Policy(EverySteps(2), [KeepAll()])
    fit(CheckpointCallback(tmp_path, policy), max_epochs=2, val_check_interval=2, model=Model([7.0, 6.0, 6.0, 5.0]))
    scores = [(record.step, record.metrics.get("val_loss")) for record in records(tmp_path)]
    assert [(2, 7.0), (4, 6.0), (6, 6.0), (8, 5.0)] == scores
    fit(CheckpointCallback(tmp_path / "b", Policy(EverySteps(1), [KeepAll()])), max_epochs=2, val_check_interval=2)
    scores = [(record.step, record.metrics.get("val_loss")) for record in records(tmp_path / "b")]
    assert [(1, None), (2, 5.0), (3, None), (4, 3.0), (5, None), (6, 4.0), (7, None), (8, 2.0)] == scores


def test_a_step_is_saved_before_its_validation_and_ranked_after_it(tmp_path: Path) -> None:
    """One payload: the score is attached to what was written before the validation began."""
    policy = Policy(EverySteps(2), [KeepBest(1, "val_loss", mode="min"), KeepLast(1)], name="{step}")
    fit(CheckpointCallback(tmp_path, policy), val_check_interval=2, max_epochs=2, model=Model([3.0, 1.0, 2.0, 4.0]))
    assert ["step=4.ckpt", "step=8.ckpt"] == files(tmp_path)


def test_neither_the_sanity_check_nor_a_dev_run_saves(tmp_path: Path) -> None:
    """A run without a training leaves nothing behind, not even a folder."""
    fit(CheckpointCallback(tmp_path / "dev", EVERYTHING), fast_dev_run=True)
    assert not (tmp_path / "dev").exists()
    training = fit(CheckpointCallback(tmp_path / "sane", EVERYTHING), max_epochs=1, num_sanity_val_steps=2)
    assert [3, 4] == [record.step for record in records(tmp_path / "sane")]
    training.validate(Model(), dataloaders=training.val_dataloaders, verbose=False)
    assert [3, 4] == [record.step for record in records(tmp_path / "sane")]


def test_an_exception_is_rescued_and_passes_through(tmp_path: Path) -> None:
    """The state of the moment is there under a name of its own, and the resume goes on from it."""
    policy = Policy(EveryEpochs(1), [KeepBest(1, "val_loss", mode="min")])
    with pytest.raises(ZeroDivisionError, match="the training breaks"):
        fit(CheckpointCallback(tmp_path, policy), model=Model(fails_at=6))
    assert ["epoch=0-step=4.ckpt", "rescue-step=6.ckpt"] == files(tmp_path)
    assert "rescue: ZeroDivisionError: the training breaks" == records(tmp_path)[-1].reason
    fit(CheckpointCallback(tmp_path, policy), resume="last", max_epochs=2)
    assert ["epoch=1-step=8.ckpt"] == files(tmp_path)


def test_without_rescue_an_exception_leaves_the_directory_as_it_is(tmp_path: Path) -> None:
    """The policy says whether."""
    policy = Policy(EveryEpochs(1), [KeepLast(1)], rescue=False)
    with pytest.raises(ZeroDivisionError, match="the training breaks"):
        fit(CheckpointCallback(tmp_path, policy), model=Model(fails_at=6))
    assert ["epoch=0-step=4.ckpt"] == files(tmp_path)


@pytest.mark.parametrize("which", ["last", "path"])
def test_a_resume_is_a_restore(tmp_path: Path, which: str) -> None:
    """Stopped after two epochs and gone on with, the directory is that of a run that was not stopped."""
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    fit(CheckpointCallback(broken, BEST_AND_LAST), max_epochs=2)
    run = records(broken)[0].run
    fit(CheckpointCallback(broken, BEST_AND_LAST), resume=broken / "last.ckpt" if which == "path" else which)
    fit(CheckpointCallback(whole, BEST_AND_LAST))
    assert files(whole) == files(broken)
    assert {run} == {record.run for record in records(broken)}


def test_going_back_to_an_older_checkpoint_abandons_what_came_after(tmp_path: Path) -> None:
    """The later ones stay, unranked; the one gone back to is protected while the training lasts."""
    policy = Policy(EveryEpochs(1), [KeepBest(1, "val_loss", mode="min"), KeepLast(2)], name="{epoch}")
    fit(CheckpointCallback(tmp_path, policy), max_epochs=3)
    assert ["epoch=1.ckpt", "epoch=2.ckpt"] == files(tmp_path)
    callback = CheckpointCallback(tmp_path, policy)
    fit(callback, resume=tmp_path / "epoch=1.ckpt", model=Model([9.0, 9.0, 8.0, 1.0, 7.0]))
    assert ["epoch=1.ckpt", "epoch=2.ckpt", "epoch=3.ckpt", "epoch=4.ckpt"] == files(tmp_path)
    assert ["epoch=2.ckpt"] == [record.name for record in CheckpointManager(tmp_path).session.manifest.abandoned]
    assert str(tmp_path / "epoch=3.ckpt") == callback.best_model_path


@pytest.mark.skipif(not is_at_least("2.5"), reason="Lightning 2.4 trains a batch twice if it was saved after it")
def test_a_step_that_was_saved_is_not_due_anew_after_a_resume(tmp_path: Path) -> None:
    """The file holds the state as it is once it is saved, so the first step after a resume owes nothing."""
    policy = Policy(EverySteps(4), [KeepAll()], name="{step}")
    fit(CheckpointCallback(tmp_path, policy), max_epochs=1)
    fit(CheckpointCallback(tmp_path, policy), max_epochs=2, resume="last")
    assert ["step=4.ckpt", "step=8.ckpt"] == files(tmp_path)


@pytest.mark.parametrize("folders", [("a", "a"), ("a", "b")])
def test_equal_callbacks_work_side_by_side(tmp_path: Path, folders: tuple[str, str]) -> None:
    """In one directory too: each has its own checkpoints and its own last, also after a resume."""
    first, second = (CheckpointCallback(tmp_path / folder, BEST_AND_LAST) for folder in folders)
    fit([first, second], max_epochs=2)
    assert first.state_key != second.state_key
    assert 2 == len({first.last_model_path, second.last_model_path})
    again = [CheckpointCallback(tmp_path / folder, BEST_AND_LAST) for folder in folders]
    fit(again, resume=first.last_model_path)
    for callback in again:
        assert 5 * BATCHES == step_of(callback.last_model_path)
        assert [4.0 * 2, 4.0 * 4] == [step_of(path) for path in callback.best_k_models]


def test_the_same_trainer_fits_on(tmp_path: Path) -> None:
    """A second fit of one Trainer is the same run; with another Trainer it is another run."""
    callback = CheckpointCallback(tmp_path, Policy(EveryEpochs(1), [KeepAll()]))
    training = fit(callback, max_epochs=1)
    training.fit_loop.max_epochs = 2
    training.fit(training.lightning_module, training.train_dataloader, training.val_dataloaders)
    assert [4, 8] == [record.step for record in records(tmp_path)]
    with pytest.warns(UserWarning, match="checkpoints of other runs; they are left alone"):
        fit(callback, max_epochs=1)
    assert ["epoch=0-step=4-v1.ckpt", "epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt"] == files(tmp_path)


def test_a_broken_newest_checkpoint_is_passed_over(tmp_path: Path) -> None:
    """``ckpt_path="last"`` resumes from the newest whole one, and says which one is not."""
    policy = Policy(EveryEpochs(1), [KeepAll()], name="{epoch}")
    fit(CheckpointCallback(tmp_path, policy), max_epochs=2)
    broken = tmp_path / "epoch=1.ckpt"
    broken.write_bytes(broken.read_bytes()[:-1] + b"x")
    with pytest.warns(UserWarning, match=r"restored epoch=0.ckpt \(step 4\), because newer or better ones"):
        fit(CheckpointCallback(tmp_path, policy), max_epochs=2, resume="last")
    assert ["epoch=0.ckpt", "epoch=1-v1.ckpt", "epoch=1.ckpt"] == files(tmp_path)
    assert 8 == step_of(tmp_path / "epoch=1-v1.ckpt")


def test_weights_alone(tmp_path: Path) -> None:
    """The policy's contents decide what the Trainer writes."""
    policy = Policy(EveryEpochs(1), [KeepLast(1)], contents="weights", name="w")
    with pytest.warns(UserWarning, match="cannot resume a run"):
        fit(CheckpointCallback(tmp_path, policy), max_epochs=1)
    state = torch.load(tmp_path / "w.ckpt", weights_only=True)
    assert "optimizer_states" not in state
    assert "state_dict" in state


def test_a_policy_may_look_at_what_is_logged(tmp_path: Path) -> None:
    """Of five epochs only those that improve are due, whatever the rules would keep."""
    callback = CheckpointCallback(tmp_path, Policy(OnImprovement("val_loss", mode="min"), [KeepAll()]))
    fit(callback)
    best, improved = float("inf"), []
    for record in records(tmp_path):
        improved.append(record.metrics["val_loss"] < best)
        best = min(best, record.metrics["val_loss"])
    assert [True, True, True, False] == improved  # The end of the training is due too.
    assert 2.0 == best
