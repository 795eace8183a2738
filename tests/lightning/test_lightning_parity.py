"""The drop-in beside Lightning's own class, in the same training: the same files, attributes and weights.

Rows are those of Lightning's behaviours that are right; what is wrong there is in ``test_lightning_differences.py``.
"""

from __future__ import annotations

import inspect
import os
import pickle
import typing
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from checkpointer_lightning import ModelCheckpoint as Ours
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.callbacks import ModelCheckpoint as Theirs
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from test_lightning_matrix import ARGUMENTS
from tiny import Model, files, fit, held, is_at_least, loader, quiet, seen, step_of, trainer

from checkpointer import CheckpointerWarning, CheckpointManager

pytestmark = quiet

TRAINERS: dict[str, dict[str, Any]] = {
    "validation in fractions": {"val_check_interval": 0.5},
    "validation each second epoch": {"check_val_every_n_epoch": 2},
    "accumulation": {"accumulate_grad_batches": 2},
    "stopped within an epoch": {"max_steps": 10},
}

NOT_BEFORE = {
    ("each moment in time", "*"): "2.5.5",  # An interval of zero was ignored.
    ("steps, newest, last", "stopped within an epoch"): "2.6",  # Any end of an epoch wrote last.
}


def run(cls: type, directory: Path, arguments: dict[str, Any], **kw: Any) -> tuple[Any, Any, Any]:
    """Train with one of the classes: its files with the step and weights of each, and its attributes."""
    callback = cls(dirpath=directory, **arguments)
    fit(callback, **kw)
    return held(directory), seen(callback, directory), callback


PLAIN = [name for name in ARGUMENTS if name not in ("best 2, last", "best, link", "best 2, steps")]
"""Those that do not differ by intention, which the matrix has."""


SAME = [
    (arguments, setting)
    for arguments in PLAIN
    for setting in TRAINERS
    # Lightning ranks the step at which it is stopped by the validation before.
    if setting != "stopped within an epoch" or ARGUMENTS[arguments].get("monitor") != "val_loss"
]


@pytest.mark.parametrize(("arguments", "setting"), SAME)
def test_other_trainers_are_served_as_by_lightnings(in_memory: Path, arguments: str, setting: str) -> None:
    """What the matrix leaves out of the Trainer's options, each in an empty directory."""
    since = NOT_BEFORE.get((arguments, setting)) or NOT_BEFORE.get((arguments, "*"))
    if since and not is_at_least(since):
        pytest.skip(f"Lightning does otherwise before {since}")
    options = {"max_epochs": 3, **TRAINERS[setting]}
    theirs = run(Theirs, in_memory / "theirs", ARGUMENTS[arguments], **options)
    ours = run(Ours, in_memory / "ours", ARGUMENTS[arguments], **options)
    assert theirs[:2] == ours[:2]


def test_weights_alone_are_lightnings_and_it_is_said_that_they_resume_nothing(tmp_path: Path) -> None:
    """Lightning lets one find out when the resume fails."""
    arguments: dict[str, Any] = {"save_weights_only": True, "save_top_k": -1}
    theirs = run(Theirs, tmp_path / "theirs", arguments, max_epochs=2)
    with pytest.warns(UserWarning, match="contents='weights': these checkpoints cannot resume a run"):
        ours = run(Ours, tmp_path / "ours", arguments, max_epochs=2)
    assert theirs[:2] == ours[:2]
    with pytest.raises(KeyError, match="Trying to restore"):
        fit(Ours(dirpath=tmp_path / "ours", **arguments), resume=tmp_path / "ours/epoch=0-step=4.ckpt")


# The class itself


def test_the_constructor_is_lightnings() -> None:
    """Order, names, defaults and types: positional calls and the command line work as before."""
    theirs, ours = (dict(list(inspect.signature(cls.__init__).parameters.items())[1:]) for cls in (Theirs, Ours))
    if not is_at_least("2.5.3"):
        del ours["save_on_exception"]  # It is the seventh since then.
    assert list(theirs) == list(ours)
    assert [p.default for p in theirs.values()] == [p.default for p in ours.values()]
    hints = typing.get_type_hints(Ours.__init__)
    hints = {name: hint for name, hint in hints.items() if name in theirs}
    assert typing.get_type_hints(Theirs.__init__) == hints


@pytest.mark.parametrize(
    "name",
    ["CHECKPOINT_JOIN_CHAR", "CHECKPOINT_EQUALS_CHAR", "CHECKPOINT_NAME_LAST", "FILE_EXTENSION", "STARTING_VERSION"],
)
def test_the_characters_of_names_are_lightnings(name: str) -> None:
    """They are there, with the same values."""
    assert getattr(Theirs, name) == getattr(Ours, name)


@pytest.mark.parametrize("on", ["class", "instance"])
def test_the_characters_of_names_may_be_set(tmp_path: Path, on: str) -> None:
    """On a class as on an instance, each changes the files as it does there."""
    values = {
        "CHECKPOINT_JOIN_CHAR": "_",
        "CHECKPOINT_EQUALS_CHAR": "-",
        "CHECKPOINT_NAME_LAST": "newest",
        "FILE_EXTENSION": ".pt",
        "STARTING_VERSION": 7,
    }
    found = []
    for base in (Theirs, Ours):
        cls = type("ModelCheckpoint", (base,), values if on == "class" else {})
        directory = tmp_path / base.__module__
        for _ in range(2):
            callback = cls(dirpath=directory, save_last=True, monitor="val_loss", filename="{epoch}")
            vars(callback).update(values if on == "instance" else {})
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # That another run's files are there is said, and right.
                fit(callback, max_epochs=1)
        found.append(files(directory))
    # The second run takes the alias over, whose target is still there; Lightning leaves a stale one beside the new.
    assert [*found[1], "newest_v7.pt"] == found[0]
    assert ["epoch-0.pt", "epoch-0_v7.pt", "newest.pt"] == found[1]


@pytest.mark.parametrize(
    "arguments",
    [
        {"save_top_k": -2},
        {"save_top_k": 2},
        {"mode": "auto"},
        {"every_n_train_steps": -1},
        {"every_n_epochs": -1},
        {"every_n_epochs": 1, "every_n_train_steps": 1},
        {"every_n_train_steps": 1, "train_time_interval": timedelta(seconds=1)},
    ],
)
def test_what_is_refused_is_refused_with_the_same_message(arguments: dict[str, Any]) -> None:
    """A message that people search for is found."""
    with pytest.raises(MisconfigurationException) as theirs:
        Theirs(**arguments)
    with pytest.raises(MisconfigurationException) as ours:
        Ours(**arguments)
    assert str(theirs.value) == str(ours.value)


def test_it_is_what_the_trainer_looks_for(tmp_path: Path) -> None:
    """No default callback joins it, it runs last, and it is what ``ckpt_path`` asks."""
    ours, other = Ours(dirpath=tmp_path), pl.callbacks.Timer()
    training = trainer([ours, other])
    assert [ours] == training.checkpoint_callbacks
    assert ours is training.checkpoint_callback
    assert ours is training.callbacks[-1]
    assert isinstance(ours, Theirs)
    assert isinstance(ours, Checkpoint)
    with pytest.raises(MisconfigurationException, match="enable_checkpointing=False"):
        trainer([Ours(dirpath=tmp_path)], enable_checkpointing=False)


@pytest.mark.parametrize(
    "arguments",
    [
        {"filename": "{epoch:03d}-{val_loss:.2f}"},
        {"filename": "{epoch}-{epoch_test}"},
        {"filename": "{val.loss:.1f}"},
        {"filename": "{val/loss:.1f}", "auto_insert_metric_name": False},
        {"filename": None},
        {"filename": "{missing:d}"},
    ],
)
def test_names_are_formatted_by_the_same_method(arguments: dict[str, Any]) -> None:
    """``format_checkpoint_name`` is public, with prefixes and versions."""
    metrics = {"epoch": 3, "step": 9, "val_loss": 0.126, "epoch_test": 7, "val.loss": 1.26, "val/loss": 1.26}
    for keywords in ({}, {"ver": 2}, {"prefix": "p"}, {"filename": "{step}"}):
        if not keywords.keys() <= inspect.signature(Theirs.format_checkpoint_name).parameters.keys():
            continue  # Lightning 2.4 has no prefix.
        expected = Theirs(**arguments).format_checkpoint_name(dict(metrics), **keywords)
        assert expected == Ours(**arguments).format_checkpoint_name(dict(metrics), **keywords)


def test_it_can_be_pickled_before_and_after_a_training(tmp_path: Path) -> None:
    """Launchers send callbacks to other processes."""
    callback = pickle.loads(pickle.dumps(Ours(dirpath=tmp_path, save_last=True)))
    fit(callback, max_epochs=1)
    again = pickle.loads(pickle.dumps(callback))
    assert callback.best_model_path == again.best_model_path
    fit(again, max_epochs=2, resume="last")
    assert 8 == step_of(again.last_model_path)


# Where


@pytest.mark.parametrize("logger", [False, True])
def test_without_dirpath_the_directory_is_lightnings(tmp_path: Path, logger: bool) -> None:
    """The logger's folder, or ``checkpoints`` in the Trainer's root."""
    found = []
    for cls in (Theirs, Ours):
        root = tmp_path / cls.__module__
        callback = cls()
        fit(callback, max_epochs=1, default_root_dir=root, logger=pl.loggers.CSVLogger(root) if logger else False)
        found.append(str(callback.dirpath).replace(str(root), "ROOT"))
    assert found[0] == found[1]
    assert ("ROOT/lightning_logs/version_0/checkpoints" if logger else "ROOT/checkpoints") == found[1]


def test_a_home_and_links_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory is made real when the callback is made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert str(tmp_path / "real") == Ours(dirpath="~/link").dirpath == Theirs(dirpath="~/link").dirpath


@pytest.mark.parametrize("cls", [Theirs, Ours])
def test_a_folder_that_is_not_empty_is_said(tmp_path: Path, cls: type) -> None:
    """And a foreign file is left alone."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.warns(UserWarning, match="exists and is not empty"):
        fit(cls(dirpath=tmp_path), max_epochs=1)
    assert ["epoch=0-step=4.ckpt", "notes.txt"] == files(tmp_path)


@pytest.mark.parametrize("cls", [Theirs, Ours])
def test_a_name_that_is_taken_gets_a_version(tmp_path: Path, cls: type) -> None:
    """A file of another program is not replaced."""
    (tmp_path / "epoch=0.ckpt").write_text("mine")
    fit(cls(dirpath=tmp_path, filename="{epoch}"), max_epochs=1)
    assert ["epoch=0-v1.ckpt", "epoch=0.ckpt"] == files(tmp_path)
    assert "mine" == (tmp_path / "epoch=0.ckpt").read_text()


# When not


@pytest.mark.parametrize("cls", [Theirs, Ours])
@pytest.mark.parametrize("kind", ["fast_dev_run", "sanity", "validate"])
def test_what_is_no_training_saves_nothing(tmp_path: Path, cls: type, kind: str) -> None:
    """Whatever the triggers."""
    callback = cls(dirpath=tmp_path / "d", every_n_train_steps=1)
    if kind == "fast_dev_run":
        fit(callback, fast_dev_run=True)
    elif kind == "sanity":
        fit(callback, num_sanity_val_steps=1, max_steps=0)
    else:
        trainer([callback]).validate(Model(), dataloaders=torch.ones(1, 2, 2), verbose=False)
    assert [] == files(tmp_path)


# NaN, and metrics of odd names


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("losses", [[float("nan"), 2, 3, 1, 4], [2, float("nan"), 1, 3, float("nan")]])
def test_nan_ranks_last(tmp_path: Path, mode: str, losses: list[float]) -> None:
    """It fills an empty place, is replaced by any number, and its score reads infinite; its name says nan."""
    arguments = {"monitor": "val_loss", "mode": mode, "save_top_k": 2, "filename": "{epoch}-{val_loss:.1f}"}
    for epochs in (1, 2, 5):
        theirs = run(Theirs, tmp_path / f"theirs{epochs}", arguments, max_epochs=epochs, model=Model(losses))
        ours = run(Ours, tmp_path / f"ours{epochs}", arguments, max_epochs=epochs, model=Model(losses))
        assert theirs[:2] == ours[:2]


class Odd(Model):
    """Logs metrics with dots and slashes, and an epoch and step of its own."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        for name in ("val.loss", "val/loss"):
            self.log(name, torch.tensor(self.losses[self.validations]))
        self.log("epoch", torch.tensor(self.current_epoch * 10.0))


@pytest.mark.parametrize(
    "arguments",
    [
        {"monitor": "val.loss", "filename": "{epoch}-{val.loss:.1f}"},
        {"monitor": "val/loss", "filename": "{val/loss:.1f}"},
        {"monitor": "val/loss", "filename": "v={val/loss:.1f}", "auto_insert_metric_name": False},
        {"monitor": "epoch", "mode": "max", "filename": "{epoch}"},
    ],
)
def test_metrics_of_odd_names_are_ranked_and_written_the_same(tmp_path: Path, arguments: dict[str, Any]) -> None:
    """Dots, slashes (they make folders), and metrics that are called as the counters are."""
    arguments = {"save_top_k": 2, **arguments}
    theirs = run(Theirs, tmp_path / "theirs", arguments, model=Odd())
    ours = run(Ours, tmp_path / "ours", arguments, model=Odd())
    assert theirs[:2] == ours[:2]


def test_a_late_metric_is_in(tmp_path: Path) -> None:
    """What the module logs at the end of the epoch is there to rank by: the callback runs after it."""

    class Late(Model):
        def on_train_epoch_end(self) -> None:
            self.log("late", torch.tensor(float(self.current_epoch)))

    arguments = {"monitor": "late", "mode": "max", "filename": "{late:.0f}"}
    theirs = run(Theirs, tmp_path / "theirs", arguments, model=Late())
    ours = run(Ours, tmp_path / "ours", arguments, model=Late())
    assert theirs[:2] == ours[:2]
    assert ["late=4.ckpt"] == files(tmp_path / "ours")


# State


def test_the_state_is_lightnings_and_more(tmp_path: Path) -> None:
    """What is in the file of a save says that the save is done; plain data, under the same key."""
    states = []
    for cls in (Theirs, Ours):
        directory = tmp_path / cls.__module__
        fit(cls(dirpath=directory, monitor="val_loss", save_last="link", save_top_k=2), max_epochs=2)
        (key, state), *_ = torch.load(directory / "last.ckpt", weights_only=True)["callbacks"].items()
        state.pop("checkpointer", None)
        states.append((key, repr(state).replace(str(directory), "DIR")))
    theirs, ours = states
    assert theirs[0] == ours[0]
    # Lightning's top-k file, which is what its link names, was written before it knew of the link.
    assert theirs[1].replace("'last_model_path': 'DIR/last.ckpt'", "") == ours[1].replace(
        "'last_model_path': 'DIR/last.ckpt'", ""
    )


@pytest.mark.parametrize(
    "arguments", [{"monitor": "val_loss", "save_top_k": 2}, {"save_last": True}, {"save_top_k": -1}]
)
def test_a_resumed_training_ends_as_lightnings(tmp_path: Path, arguments: dict[str, Any]) -> None:
    """Two epochs, a stop, and on: the same files and attributes."""
    found = []
    for cls in (Theirs, Ours):
        directory = tmp_path / cls.__module__
        first = run(cls, directory, arguments, max_epochs=2)[2]
        source = first.last_model_path or sorted(directory.glob("*.ckpt"))[-1]
        found.append(run(cls, directory, arguments, resume=source)[:2])
    assert found[0] == found[1]


def test_a_validation_with_a_checkpoint_restores_what_users_read(tmp_path: Path) -> None:
    """As in Lightning, the callback's state is restored there too, and the counters are not moved."""
    found = []
    for cls in (Theirs, Ours):
        directory = tmp_path / cls.__module__
        arguments: dict[str, Any] = {"monitor": "val_loss", "dirpath": directory}
        fit(cls(**arguments), max_epochs=2)
        callback = cls(**arguments)
        training = trainer([callback])
        training.validate(Model(), torch.ones(1, 2, 2), ckpt_path=directory / "epoch=1-step=8.ckpt", verbose=False)
        found.append((Path(callback.best_model_path).name, training.global_step, training.current_epoch))
    assert found[0] == found[1]


@pytest.mark.parametrize("which", ["best", "last"])
def test_best_and_last_are_found(tmp_path: Path, which: str) -> None:
    """``ckpt_path="best"`` and ``"last"`` name the same file."""
    found = []
    for cls in (Theirs, Ours):
        directory = tmp_path / cls.__module__
        callback = cls(dirpath=directory, monitor="val_loss", save_last=True)
        training = fit(callback, max_epochs=4)
        training.validate(Model(), torch.ones(1, 2, 2), ckpt_path=which, verbose=False)
        found.append(Path(str(training.ckpt_path)).name)
    assert found[0] == found[1]


@pytest.mark.parametrize("how", ["last", "path"])
def test_stock_lightning_goes_on_with_what_is_written_here(tmp_path: Path, how: str) -> None:
    """Lightning's class continues from here with its ranking, by name and by path."""
    arguments: dict[str, Any] = {"dirpath": tmp_path, "monitor": "val_loss", "save_top_k": 2, "save_last": True}
    first = Ours(**arguments)
    fit(first, max_epochs=2)
    assert [4, 8] == [step_of(path) for path in first.best_k_models]
    callback = Theirs(**arguments)
    training = fit(callback, max_epochs=4, resume="last" if how == "last" else first.best_model_path)
    assert [8, 16] == [step_of(path) for path in callback.best_k_models]
    assert 16 == training.global_step


def test_a_run_that_lightning_started_goes_on_from_its_last(tmp_path: Path) -> None:
    """``ckpt_path="last"`` finds Lightning's file first and this class's own from then on; the ranking is one."""
    arguments: dict[str, Any] = {"dirpath": tmp_path, "monitor": "val_loss", "save_top_k": 2, "save_last": True}
    fit(Theirs(**arguments), max_epochs=2)
    for epochs in (4, 5):
        callback = Ours(**arguments)
        with pytest.warns(UserWarning, match=r"last.ckpt is not this run's; the alias is last-v1.ckpt instead"):
            training = fit(callback, max_epochs=epochs, resume="last")
        assert [8, 16] == [step_of(path) for path in callback.best_k_models]
        assert 4 * epochs == training.global_step == step_of(callback.last_model_path)
    assert Path(str(training.ckpt_path)).name == Path(callback.last_model_path).name


@pytest.mark.parametrize(
    "arguments", [{"monitor": "val_loss", "save_top_k": 2}, {}, {"monitor": "val_loss", "mode": "max"}]
)
def test_a_run_that_lightning_started_goes_on_with_its_ranking(tmp_path: Path, arguments: dict[str, Any]) -> None:
    """The same files and attributes as if Lightning's class had gone on."""
    found = []
    for cls in (Theirs, Ours):
        directory = tmp_path / cls.__module__
        run(Theirs, directory, arguments, max_epochs=2)
        newest = max(directory.glob("*.ckpt"), key=step_of)
        found.append(run(cls, directory, arguments, resume=newest)[:2])
    assert found[0] == found[1]


@pytest.mark.parametrize("cls", [Theirs, Ours])
def test_a_run_that_resumes_another_leaves_its_files(tmp_path: Path, cls: type) -> None:
    """A second directory begins with the first one's checkpoint, and removes nothing of it."""
    first = cls(dirpath=tmp_path / "1", monitor="val_loss")
    fit(first, max_epochs=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning says that the directory has changed.
        fit(cls(dirpath=tmp_path / "2", monitor="val_loss"), resume=first.best_model_path, max_epochs=4)
    assert ["epoch=1-step=8.ckpt"] == files(tmp_path / "1")
    assert ["epoch=3-step=16.ckpt"] == files(tmp_path / "2")


def test_folders_that_a_strategy_writes_are_checkpoints(tmp_path: Path) -> None:
    """Removed as a whole, and replaced as one."""

    class Sharded(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            Path(path).mkdir()
            super().save_checkpoint(checkpoint, Path(path) / "shard", storage_options)

    fit(Ours(dirpath=tmp_path, monitor="val_loss"), plugins=[Sharded()])
    assert ["epoch=3-step=16.ckpt/shard"] == files(tmp_path)


# Messages


def test_verbose_says_what_lightning_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The same lines, at the same level."""
    said = []
    for cls in (Theirs, Ours):
        caplog.clear()
        directory = tmp_path / cls.__module__
        run(cls, directory, {"monitor": "val_loss", "verbose": True})
        lines = [record.getMessage().replace(str(directory), "DIR") for record in caplog.records]
        said.append([line for line in lines if line.startswith("Epoch")])
    assert said[0] == said[1]
    assert 5 == len(said[1])


def test_the_best_are_listed_in_a_file(tmp_path: Path) -> None:
    """``to_yaml`` writes path and score, to the given file or in the directory."""
    callback = Ours(dirpath=tmp_path, monitor="val_loss", save_top_k=2)
    fit(callback)
    callback.to_yaml()
    callback.to_yaml(tmp_path / "other.yaml")
    expected = {str(tmp_path / "epoch=1-step=8.ckpt"): 3.0, str(tmp_path / "epoch=3-step=16.ckpt"): 2.0}
    assert expected == yaml.safe_load((tmp_path / "best_k_models.yaml").read_text())
    assert expected == yaml.safe_load((tmp_path / "other.yaml").read_text())


def test_loggers_are_called(tmp_path: Path) -> None:
    """After the file is there, with an object whose best and last are right."""
    notified: list[tuple[bool, str]] = []

    class Notified(pl.loggers.CSVLogger):
        def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
            path = Path(checkpoint_callback.best_model_path)
            notified.append((path.exists(), path.name))

    fit(Ours(dirpath=tmp_path / "d", monitor="val_loss"), logger=Notified(tmp_path), max_epochs=4)
    assert [(True, "epoch=0-step=4.ckpt"), (True, "epoch=1-step=8.ckpt"), (True, "epoch=3-step=16.ckpt")] == notified


def test_43_without_a_version_counter_an_earlier_run_s_files_are_overwritten(tmp_path: Path) -> None:
    """As in Lightning; a file that is not a checkpoint keeps its name."""
    arguments: dict[str, Any] = {"dirpath": tmp_path, "filename": "model-{epoch}", "save_top_k": -1}
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # It is said that the directory is not empty.
            fit(Ours(**arguments, enable_version_counter=False), max_epochs=2)
            (tmp_path / "model-epoch=2.ckpt").write_bytes(b"mine")
            fit(Ours(**arguments, enable_version_counter=False), max_epochs=3)
    names = ["model-epoch=0.ckpt", "model-epoch=1.ckpt", "model-epoch=2-v1.ckpt", "model-epoch=2.ckpt"]
    assert names == files(tmp_path)
    assert b"mine" == (tmp_path / "model-epoch=2.ckpt").read_bytes()


def test_without_a_version_counter_the_files_of_lightning_s_own_class_are_overwritten(tmp_path: Path) -> None:
    """They have no record. A file that is not a checkpoint keeps its name."""
    arguments: dict[str, Any] = {"dirpath": tmp_path, "filename": "model-{epoch}", "save_top_k": -1}
    arguments |= {"enable_version_counter": False}
    fit(Theirs(**arguments), max_epochs=3)
    (tmp_path / "model-epoch=2.ckpt").write_bytes(b"mine")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It is said that the directory is not empty.
        fit(Ours(**arguments), max_epochs=3)
    names = ["model-epoch=0.ckpt", "model-epoch=1.ckpt", "model-epoch=2-v1.ckpt", "model-epoch=2.ckpt"]
    assert names == files(tmp_path)
    after = {path.name: path.read_bytes() for path in tmp_path.glob("*.ckpt")}
    assert ["model-epoch=2.ckpt"] == [name for name in before if before[name] == after[name]]
    assert [names[0], names[1], names[2]] == sorted(record.name for record in CheckpointManager(tmp_path).records)


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("last", [True, "link"])
def test_without_a_version_counter_the_last_ckpt_of_lightning_s_own_class_is_replaced(
    tmp_path: Path, last: Any, resumed: bool
) -> None:
    """Also if the training resumes from it: the checkpoint that replaces it is there before."""
    arguments: dict[str, Any] = {"dirpath": tmp_path, "filename": "model-{step}", "save_top_k": -1, "save_last": last}
    fit(Theirs(**arguments), max_epochs=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Checkpoint directory .* is not empty")
        resume = str(tmp_path / "last.ckpt") if resumed else None
        fit(Ours(**arguments, enable_version_counter=False), max_epochs=3, resume=resume)
    expected = ["last.ckpt", "model-step=12.ckpt", "model-step=4.ckpt", "model-step=8.ckpt"]
    assert expected == files(tmp_path)
    assert 12 == torch.load(tmp_path / "last.ckpt", weights_only=False)["global_step"]


def test_a_last_ckpt_that_is_no_checkpoint_is_kept_without_a_version_counter(tmp_path: Path) -> None:
    """The alias gets a version, and a warning says so."""
    (tmp_path / "last.ckpt").write_bytes(b"mine")
    with pytest.warns(CheckpointerWarning, match=r"last\.ckpt is not this run's; the alias is last-v1\.ckpt"):
        fit(Ours(dirpath=tmp_path, save_last=True, enable_version_counter=False), max_epochs=1)
    assert b"mine" == (tmp_path / "last.ckpt").read_bytes()
    assert "last-v1.ckpt" in files(tmp_path)


# What a new callback knows of a directory that was used


def best_of(directory: Path, arguments: dict[str, Any], where: str) -> str:
    """Train into a directory, and return its best checkpoint, as a new Trainer finds it for a fit or a validation."""
    fit(Ours(dirpath=directory, **arguments), max_epochs=3)
    again = trainer(Ours(dirpath=directory, **arguments), max_epochs=3)
    if where == "fit":
        again.fit(Model(), loader(), loader(1), ckpt_path="best")
    else:
        again.validate(Model(), loader(1), ckpt_path="best", verbose=False)
    return os.path.relpath(str(again.ckpt_path), directory)


@pytest.mark.parametrize("where", ["fit", "validate"])
@pytest.mark.parametrize(
    ("arguments", "best"),
    [
        ({"monitor": "val_loss", "save_last": True}, "epoch=1-step=8.ckpt"),
        ({"monitor": "val_loss", "mode": "max", "save_top_k": 2}, "epoch=0-step=4.ckpt"),
        ({}, "epoch=2-step=12.ckpt"),
    ],
)
def test_best_of_a_finished_directory_is_found(
    tmp_path: Path, arguments: dict[str, Any], best: str, where: str
) -> None:
    """By a new Trainer and a new callback: the records know it."""
    assert best == best_of(tmp_path, arguments, where)


def test_best_without_a_directory_given_is_where_the_trainer_writes(tmp_path: Path) -> None:
    """The Trainer's own folder, as for ``"last"``."""
    fit(Ours(monitor="val_loss"), max_epochs=3, default_root_dir=tmp_path)
    again = fit(Ours(monitor="val_loss"), max_epochs=4, default_root_dir=tmp_path, resume="best")
    assert str(tmp_path / "checkpoints/epoch=1-step=8.ckpt") == again.ckpt_path


def test_best_that_was_not_saved_is_the_error_that_lightning_raises(tmp_path: Path) -> None:
    """An empty directory has none, and a callback does not look before a Trainer asks."""
    callback = Ours(dirpath=tmp_path, monitor="val_loss")
    assert "" == callback.best_model_path
    with pytest.raises(ValueError, match="not configured to save the best model"):
        fit(callback, resume="best")


def test_weights_alone_are_enough_for_a_validation(tmp_path: Path) -> None:
    """Of the newest and of the best, though no training can go on from them."""
    arguments: dict[str, Any] = {"dirpath": tmp_path, "monitor": "val_loss", "save_weights_only": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It is said that nothing can go on from them.
        fit(Ours(**arguments, save_last=True), max_epochs=3)
    found = []
    for which in ("last", "best"):
        again = trainer(Ours(**arguments, save_last=True))
        again.validate(Model(), loader(1), ckpt_path=which, verbose=False)
        found.append(Path(str(again.ckpt_path)).name)
    assert ["last.ckpt", "epoch=1-step=8.ckpt"] == found


# What a callback shows, before and after a resume

STATES = ["best_model_path", "best_model_score", "best_k_models", "kth_best_model_path", "kth_value"]
STATES += ["last_model_path", "current_score", "dirpath", "monitor", "mode", "save_top_k", "save_last", "filename"]


@pytest.mark.parametrize("what", ["fit, no epoch left", "fit, one more", "validate"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"monitor": "step", "mode": "max", "save_top_k": 2},
        {"monitor": "epoch", "mode": "max"},
        {"monitor": "val_loss", "save_top_k": -1, "save_last": "link"},
        {"save_top_k": 0, "save_last": True},
    ],
)
def test_attributes_before_and_after_a_resume_are_equal(tmp_path: Path, arguments: dict[str, Any], what: str) -> None:
    """Types included, and those of the state that goes into the next checkpoint; ours and Lightning's are the same."""
    first = Ours(dirpath=tmp_path / "ours", **arguments)
    fit(first, max_epochs=3)
    before, state = shown(first), first.state_dict()
    theirs = Theirs(dirpath=tmp_path / "theirs", **arguments)
    fit(theirs, max_epochs=3)
    assert before == {name: text.replace("theirs", "ours") for name, text in shown(theirs).items()}
    again = Ours(dirpath=tmp_path / "ours", **arguments)
    path = first.last_model_path or first.best_model_path
    if what == "validate" and not is_at_least("2.5"):
        return  # Lightning 2.4 gives a callback its state back for a fit only.
    if what == "validate":
        trainer(again).validate(Model(), loader(1), ckpt_path=path, verbose=False)
    else:
        at_start = AtStart(again)
        fit([again, at_start], max_epochs=3 if what == "fit, no epoch left" else 4, resume=path)
        if what == "fit, one more":
            assert before == at_start.seen
            return
    assert before == shown(again)
    for name in ("checkpointer", "best_k_models"):
        assert repr(state.pop(name)) == repr(again.state_dict()[name])
    assert state == {name: again.state_dict()[name] for name in state}


def shown(callback: Any) -> dict[str, str]:
    """Return the public attributes of a callback, with their types."""
    return {name: repr(getattr(callback, name)) for name in STATES}


class AtStart(pl.Callback):
    """Looks at a checkpoint callback before the first batch."""

    def __init__(self, callback: Any) -> None:
        self.callback = callback
        self.seen: dict[str, str] = {}

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen = self.seen or shown(self.callback)


# Exceptions


@pytest.mark.parametrize("arguments", [{}, {"save_on_exception": True}])
def test_an_exception_is_saved_if_asked_for(tmp_path: Path, arguments: dict[str, Any]) -> None:
    """And only then."""
    with pytest.raises(ZeroDivisionError, match="the training breaks"):
        fit(Ours(dirpath=tmp_path, **arguments), model=Model(fails_at=6))
    assert (["epoch=0-step=4.ckpt"] + (["epoch=1-step=6.ckpt"] if arguments else [])) == files(tmp_path)
    with pytest.raises(ZeroDivisionError, match="the training breaks"):
        fit(Ours(dirpath=tmp_path / "saved", **arguments), model=Model(fails_at=4))
    assert ["epoch=0-step=4.ckpt"] == files(tmp_path / "saved")


@pytest.mark.skipif(not is_at_least("2.5.3"), reason="older ones have no save_on_exception")
@pytest.mark.parametrize("filename", ["exception", "{epoch}-{step}-{val_loss:.2f}", None])
def test_an_exception_is_saved_under_the_name_that_lightning_gives(tmp_path: Path, filename: str | None) -> None:
    """Where nothing has that name."""
    arguments: dict[str, Any] = {
        "filename": filename,
        "monitor": "val_loss",
        "every_n_epochs": 5,
        "save_on_exception": True,
    }
    for cls in (Theirs, Ours):
        with pytest.raises(ZeroDivisionError, match="the training breaks"):
            fit(cls(dirpath=tmp_path / cls.__module__, **arguments), model=Model(fails_at=4))
    theirs, ours = (tmp_path / cls.__module__ for cls in (Theirs, Ours))
    assert files(theirs) == files(ours) != []


@pytest.mark.skipif(not is_at_least("2.5.3"), reason="older ones have no save_on_exception")
@pytest.mark.parametrize("save_last", [True, "link"])
@pytest.mark.parametrize("step", [2, 6])
def test_last_names_what_an_exception_saved(tmp_path: Path, save_last: Any, step: int) -> None:
    """As in Lightning, also where a regular checkpoint has been saved before."""
    for cls in (Theirs, Ours):
        callback = cls(tmp_path / cls.__module__, save_last=save_last, save_on_exception=True)
        with pytest.raises(ZeroDivisionError, match="the training breaks"):
            fit(callback, model=Model(fails_at=step))
        last = tmp_path / cls.__module__ / "last.ckpt"
        assert (step, save_last == "link") == (step_of(last), last.is_symlink())
    theirs, ours = (tmp_path / cls.__module__ for cls in (Theirs, Ours))
    assert files(theirs) == files(ours) != []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_saved_too(tmp_path: Path, error: type[BaseException]) -> None:
    """Ctrl-C within a training step, as an exit."""

    class Interrupted(Model):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.global_step == 2:
                raise error

    with pytest.raises(SystemExit):
        fit(Ours(dirpath=tmp_path, save_on_exception=True), model=Interrupted())
    assert ["epoch=0-step=2.ckpt"] == files(tmp_path)
