"""Single behaviours of Lightning's class, by their row: what is equal runs beside it, what differs says how."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointer_lightning import ModelCheckpoint as Ours
from lightning.pytorch.callbacks import ModelCheckpoint as Theirs
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from tiny import BATCHES, Forked, Model, files, fit, is_at_least, quiet, step_of

from checkpointer import CheckpointManager

pytestmark = quiet


class Manual(Model):
    """Steps its optimizers by hand, and may keep its weights before it does."""

    def __init__(self, *, optimizers: int = 1, captures: str = "") -> None:
        super().__init__()
        self.automatic_optimization = False
        self.number = optimizers
        self.captures = captures
        if captures:
            self.saved_models: dict[int, Any] = {}

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        loss = self.layer(batch).pow(2).mean()
        if self.captures:
            whole: Any = self if self.captures == "module" else self.layer
            self.saved_models[batch_idx] = {name: value.detach().clone() for name, value in whole.state_dict().items()}
        self.manual_backward(loss)
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), 0.1) for _ in range(self.number)]


def weights(path: Path) -> Any:
    """Return the weights in a checkpoint."""
    return torch.load(path, weights_only=True)["state_dict"]["layer.weight"].tolist()


# One name for a batch's value and for the mean of an epoch

FORKED = [5.0, 5.0, 5.0, 0.1, 5.0, 0.5, 5.0, 5.0]


@pytest.mark.parametrize("cls", [Theirs, Ours])
def test_the_mean_of_an_epoch_does_not_rank_its_last_step_anew(tmp_path: Path, cls: Any) -> None:
    """A step that was ranked by its own loss keeps that rank: the mean says nothing about its weights."""
    name = "{step}-{train_loss:.2f}"
    callback = cls(dirpath=tmp_path, monitor="train_loss", every_n_train_steps=2, save_top_k=1, filename=name)
    fit(callback, model=Forked(FORKED), max_epochs=2)
    assert ["step=4-train_loss=0.10.ckpt"] == files(tmp_path)


@pytest.mark.skipif(not is_at_least("2.5"), reason="Lightning 2.4 trains the last batch of an epoch again")
def test_the_mean_of_an_epoch_does_not_rank_a_step_anew_after_a_resume(tmp_path: Path) -> None:
    """The training goes on at the end of the epoch whose last step was saved."""
    arguments: dict[str, Any] = {"dirpath": tmp_path, "monitor": "train_loss", "every_n_train_steps": 2}
    arguments["filename"] = "{step}"
    with pytest.raises(ZeroDivisionError):
        fit(Ours(**arguments), model=Ending(FORKED), max_epochs=2)
    fit(Ours(**arguments), model=Forked(FORKED), max_epochs=2, resume=tmp_path / "step=4.ckpt")
    assert ["step=4.ckpt"] == files(tmp_path)


class Ending(Forked):
    """Breaks before its first epoch ends."""

    def on_validation_start(self) -> None:
        if not self.trainer.sanity_checking:
            raise ZeroDivisionError


# Several optimizers, and a state from before the step


def test_13_several_optimizers_make_no_due_point_be_skipped(tmp_path: Path) -> None:
    """Two steps a batch: every third is reached or passed at the end of a batch, where Lightning wants it hit."""
    found = {}
    for cls in (Theirs, Ours):
        callback = cls(tmp_path / cls.__module__, "{step}", every_n_train_steps=3, save_top_k=-1)
        fit(callback, model=Manual(optimizers=2), max_epochs=2)
        found[cls] = files(tmp_path / cls.__module__)
    assert ["step=12.ckpt", "step=6.ckpt"] == found[Theirs]
    assert ["step=10.ckpt", "step=12.ckpt", "step=16.ckpt", "step=4.ckpt", "step=6.ckpt"] == found[Ours]


@pytest.mark.skipif(not is_at_least("2.6"), reason="Lightning saves no captured state before 2.6")
def test_22_a_state_captured_before_the_step_is_what_is_saved(tmp_path: Path) -> None:
    """As in Lightning's class, and the training goes on with the weights after the step."""
    found = {}
    for cls in (Theirs, Ours):
        model = Manual(captures="layer")
        directory = tmp_path / cls.__module__
        fit(cls(directory, "{step}", every_n_train_steps=1, save_top_k=-1), model=model, max_epochs=1)
        found[cls] = [weights(directory / f"step={step}.ckpt") for step in (1, 2, 3, 4)], model.layer.weight.tolist()
    assert found[Theirs] == found[Ours]
    assert found[Ours][0][3] != found[Ours][1]


@pytest.mark.parametrize("arguments", [{"every_n_train_steps": 1}, {"train_time_interval": timedelta(0)}])
def test_22_the_whole_module_may_be_captured_and_any_trigger_saves_it(
    tmp_path: Path, arguments: dict[str, Any]
) -> None:
    """Lightning's class knows only a module called layer, and only steps."""
    model = Manual(captures="module")
    fit(Ours(tmp_path, "{step}", save_top_k=-1, **arguments), model=model, max_epochs=1)
    assert model.saved_models[3]["layer.weight"].tolist() == weights(tmp_path / "step=4.ckpt")
    assert model.layer.weight.tolist() != weights(tmp_path / "step=4.ckpt")


def test_22_what_fits_nothing_is_said(tmp_path: Path) -> None:
    """A capture of some other module cannot be put in the place of this one."""

    class Odd(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            self.saved_models = {0: {"elsewhere": torch.ones(1)}}

    with pytest.warns(UserWarning, match="saved_models has 'elsewhere', which neither the module nor its layer has"):
        fit(Ours(tmp_path, every_n_train_steps=4), model=Odd(captures="layer"), max_epochs=1)


# The scheduler, and last


def test_23_schedulers_have_stepped_before_a_save(tmp_path: Path) -> None:
    """What lies in a file beside the weights is what Lightning puts there."""

    class Scheduled(Model):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    found = {}
    for cls in (Theirs, Ours):
        directory = tmp_path / cls.__module__
        fit(cls(directory, "{step}", every_n_train_steps=3, save_top_k=-1), model=Scheduled(), max_epochs=2)
        states = [torch.load(directory / name, weights_only=True) for name in files(directory)]
        found[cls] = [
            {key: repr(state[key]) for key in ("epoch", "global_step", "loops", "lr_schedulers", "optimizer_states")}
            for state in states
        ]
    assert found[Theirs] == found[Ours]
    assert 2 == len(found[Ours])


@pytest.mark.parametrize("how", [True, "link"])
@pytest.mark.parametrize("cls", [Theirs, Ours])
def test_27_last_is_a_file_or_a_relative_link(tmp_path: Path, cls: type, how: Any) -> None:
    """As it is asked for."""
    fit(cls(tmp_path, save_last=how), max_epochs=1)
    last = tmp_path / "last.ckpt"
    assert (how == "link") == last.is_symlink()
    assert how is True or "epoch=0-step=4.ckpt" == os.readlink(last)
    assert 4 == step_of(last)


@pytest.mark.parametrize("monitor", [None, "val_loss"])
@pytest.mark.parametrize("how", [True, "link"])
def test_30_last_is_there_each_epoch_whatever_the_top_k_wait_for(tmp_path: Path, how: Any, monitor: str | None) -> None:
    """The top k are those of every second epoch, as if there were no last; a crash finds the newest epoch."""
    arguments: dict[str, Any] = {"filename": "{epoch}", "monitor": monitor, "every_n_epochs": 2, "save_last": how}
    callback = Ours(tmp_path, **arguments)
    with pytest.raises(ZeroDivisionError, match="the training breaks"):
        fit(callback, model=Model([5.0, 4.0, 1.0], fails_at=14))
    assert 12 == step_of(tmp_path / "last.ckpt")
    assert str(tmp_path / "epoch=1.ckpt") == callback.best_model_path
    fit(Ours(tmp_path, **arguments), model=Model([5.0, 4.0, 1.0, 3.0, 9.0]), resume="last")
    kept = ["epoch=3.ckpt"] + (["epoch=4.ckpt"] if how == "link" else [])
    assert [*kept, "last.ckpt"] == files(tmp_path)
    assert 20 == step_of(tmp_path / "last.ckpt")


def test_40_a_field_that_is_not_reported_gives_a_warning(tmp_path: Path) -> None:
    """The name is Lightning's, with a 0; that it is a mistake is said once."""
    with pytest.warns(UserWarning, match=r"asks for 'val_lss', which was not reported \(have: train_loss, val_loss\)"):
        fit(Ours(tmp_path, "{val_lss:.2f}"), max_epochs=2)
    assert ["val_lss=0.00.ckpt"] == files(tmp_path)


# What others override


class FromThirdEpoch:
    """Waits, as packages do: a step the method is not called for competes for nothing."""

    def _save_topk_checkpoint(self, trainer: Any, monitor_candidates: dict[str, Any]) -> None:
        if trainer.current_epoch >= 2:
            super()._save_topk_checkpoint(trainer, monitor_candidates)  # type: ignore[misc]


class Summing:
    """Ranks by something of its own."""

    def _save_topk_checkpoint(self, trainer: Any, monitor_candidates: dict[str, Any]) -> None:
        if "val_loss" in monitor_candidates:
            monitor_candidates["sum"] = -monitor_candidates["val_loss"]
        super()._save_topk_checkpoint(trainer, monitor_candidates)  # type: ignore[misc]


@pytest.mark.parametrize("monitor", [None, "val_loss"])
@pytest.mark.parametrize("cls", [Theirs, Ours])
def test_an_overridden_save_of_the_top_k_is_asked(tmp_path: Path, cls: type, monitor: str | None) -> None:
    """The first epochs are the best, and do not count."""
    callback = type("ModelCheckpoint", (FromThirdEpoch, cls), {})(tmp_path, "{epoch}", monitor=monitor)
    fit(callback, model=Model([1.0, 2.0, 4.0, 3.0, 5.0]))
    best = "epoch=3.ckpt" if monitor else "epoch=4.ckpt"
    assert str(tmp_path / best) == callback.best_model_path
    assert [best] == files(tmp_path)


@pytest.mark.parametrize("cls", [Theirs, Ours])
def test_an_overridden_save_of_the_top_k_may_add_what_it_ranks_by(tmp_path: Path, cls: type) -> None:
    """A score of several metrics, for example."""
    callback = type("ModelCheckpoint", (Summing, cls), {})(tmp_path, "{epoch}", monitor="sum", mode="max")
    fit(callback)
    assert -2.0 == callback.best_model_score
    assert ["epoch=3.ckpt"] == files(tmp_path)


def test_last_is_the_newest_though_the_top_k_wait(tmp_path: Path) -> None:
    """Waiting is for the top k; a crash before they are due leaves something to go on from."""
    callback = type("ModelCheckpoint", (FromThirdEpoch, Ours), {})(tmp_path, "{epoch}", save_last=True)
    fit(callback, max_epochs=2)
    assert ["last.ckpt"] == files(tmp_path)
    assert 2 * BATCHES == step_of(tmp_path / "last.ckpt")


def test_a_save_that_is_asked_for_is_made(tmp_path: Path) -> None:
    """Code that calls the methods itself, within a training, gets a checkpoint."""

    class Asking(Model):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.global_step == 2:
                checkpoints: Any = self.trainer.checkpoint_callback
                checkpoints._save_topk_checkpoint(self.trainer, checkpoints._monitor_candidates(self.trainer))

    fit(Ours(tmp_path, "{step}", save_top_k=-1, every_n_epochs=0), model=Asking(), max_epochs=1)
    assert ["step=2.ckpt"] == files(tmp_path)


# Mounts, and other callbacks


def test_73_a_mount_that_refuses_chmod_does_not_fail_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a FUSE mount does."""

    def refused(*args: Any, **kw: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refused)
    monkeypatch.setattr(os, "fchmod", refused)
    fit(Ours(tmp_path, save_last=True), max_epochs=1)
    assert ["epoch=0-step=4.ckpt", "last.ckpt"] == files(tmp_path)


@pytest.mark.parametrize("cls", [Theirs, Ours])
def test_79_lightnings_own_exception_callback_works_beside_it(tmp_path: Path, cls: type) -> None:
    """Its file is among the candidates for last, and the next fit without a path goes on from the newest."""

    def pair() -> list[Any]:
        return [cls(tmp_path / "run", "{epoch}"), OnExceptionCheckpoint(tmp_path / "rescued")]

    with pytest.raises(ZeroDivisionError, match="the training breaks"):
        fit(pair(), model=Model(fails_at=6))
    assert ["on_exception.ckpt"] == files(tmp_path / "rescued")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training = fit(pair(), max_epochs=3)
    assert str(tmp_path / "rescued/on_exception.ckpt") == training.ckpt_path
    assert 3 * BATCHES == training.global_step
    assert [] == files(tmp_path / "rescued")
    assert "epoch=2.ckpt" in files(tmp_path / "run")
    if cls is Ours:
        assert [12] == [record.step for record in CheckpointManager(tmp_path / "run").records]
