"""The drop-in beside Lightning's own class in the same training: constructor arguments, validations, histories.

The test compares the files with the step, epoch and weights of each, and the attributes that users and loggers read.
One table lists the differences with their reasons. A difference that is not listed fails, and so does an entry without
a difference.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from checkpointer_lightning import ModelCheckpoint as Ours
from lightning.pytorch.callbacks import ModelCheckpoint as Theirs
from tiny import fit, held, is_at_least, quiet, seen

pytestmark = quiet

VALIDATION: dict[str, dict[str, Any]] = {
    "each epoch": {},
    "within epochs": {"val_check_interval": 2},
    "none": {"limit_val_batches": 0},
}

ARGUMENTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "all": {"save_top_k": -1},
    "none": {"save_top_k": 0},
    "all, last": {"save_top_k": -1, "save_last": True},
    "all, link": {"save_top_k": -1, "save_last": "link"},
    "newest, last": {"save_last": True},
    "newest, link": {"save_last": "link"},
    "fixed name": {"filename": "model"},
    "fixed name, all, overwritten": {"filename": "model", "save_top_k": -1, "enable_version_counter": False},
    "second epochs": {"every_n_epochs": 2, "save_top_k": -1},
    "no epochs": {"every_n_epochs": 0},
    "steps": {"every_n_train_steps": 3, "save_top_k": -1},
    "steps, newest, last": {"every_n_train_steps": 3, "save_last": True},
    "steps, train metric": {"every_n_train_steps": 2, "monitor": "train_loss", "save_top_k": 2},
    "each step, train metric": {
        "every_n_train_steps": 1,
        "monitor": "train_loss",
        "save_top_k": -1,
        "save_last": True,
    },
    "each moment in time": {"train_time_interval": timedelta(0), "save_top_k": -1},
    "after the epoch": {"save_on_train_epoch_end": True, "save_top_k": -1},
    "after the validation": {"save_on_train_epoch_end": False, "save_top_k": -1},
    "by epoch": {"monitor": "epoch", "mode": "max", "save_top_k": 2},
    "by step": {"monitor": "step", "save_top_k": 2},
    "digits in names": {"filename": "{epoch:02d}-{step:04d}", "save_top_k": -1},
    "names without keys": {"filename": "e{epoch}s{step}", "auto_insert_metric_name": False, "save_top_k": -1},
    "folders in names": {"filename": "sub/{epoch}-{step}", "save_top_k": -1},
    "best": {"monitor": "val_loss"},
    "best 2": {"monitor": "val_loss", "save_top_k": 2},
    "best 2, last": {"monitor": "val_loss", "save_top_k": 2, "save_last": True},
    "best, link": {"monitor": "val_loss", "save_last": "link"},
    "best 3, most": {"monitor": "val_loss", "save_top_k": 3, "mode": "max"},
    "all, ranked": {"monitor": "val_loss", "save_top_k": -1},
    "best 2, in names": {"monitor": "val_loss", "save_top_k": 2, "filename": "{epoch}-{val_loss:.2f}"},
    "best 2, under one name": {"monitor": "val_loss", "save_top_k": 2, "filename": "best"},
    "best, under one name, overwritten": {"monitor": "val_loss", "filename": "best", "enable_version_counter": False},
    "best 2, second epochs": {"monitor": "val_loss", "save_top_k": 2, "every_n_epochs": 2},
    "best 2, steps": {"monitor": "val_loss", "save_top_k": 2, "every_n_train_steps": 2},
}

# Which trainings of the matrix differ, by name. A row is: arguments, validation, history, what differs; "*" is each.
Row = tuple[str, str, str, str]
RANKS = "best_k_models best_model_path current_score files kth_best_model_path kth_value"
ALLOWED: dict[str, list[Row]] = {
    "last is the newest state, whether or not it is among the best": [
        ("best 2, last", "each epoch", "resume", "files"),
        ("best 2, last", "within epochs", "*", "files"),
        ("best, link", "each epoch", "*", "files"),
        ("best, link", "within epochs", "*", "files"),
    ],
    "a new run in a used directory takes over an alias whose target has a name of its own": [
        ("all, last", "*", "rerun", "files last_model_path"),
        ("all, link", "*", "rerun", "files last_model_path"),
        ("newest, last", "*", "rerun", "files last_model_path"),
        ("newest, link", "*", "rerun", "files last_model_path"),
        ("steps, newest, last", "*", "rerun", "files last_model_path"),
        ("each step, train metric", "*", "rerun", "files last_model_path"),
        ("best 2, last", "each epoch", "rerun", "files last_model_path"),
        ("best 2, last", "none", "rerun", "files last_model_path"),
        ("best, link", "*", "rerun", "files last_model_path"),
    ],
    "a metric that is missing holds nothing back that needs none": [
        ("best 2, last", "none", "*", "files"),
        ("best, link", "none", "*", "files"),
        ("all, ranked", "none", "fresh", "files"),
        ("all, ranked", "none", "rerun", "files"),
    ],
    "only what was measured at a step is ranked there": [
        ("best 2, steps", "each epoch", "fresh", RANKS),
        ("best 2, steps", "each epoch", "rerun", RANKS),
        ("best 2, steps", "each epoch", "resume", "best_k_models best_model_path best_model_score current_score files"),
        ("best 2, steps", "each epoch", "resume", "kth_best_model_path"),
        ("best 2, steps", "within epochs", "fresh", "best_k_models files kth_best_model_path kth_value"),
        ("best 2, steps", "within epochs", "rerun", "best_k_models files kth_best_model_path kth_value"),
        ("best 2, steps", "within epochs", "resume", "best_k_models files"),
    ],
    "the current score is known after a resume": [
        ("by step", "*", "resume", "current_score"),
        ("best", "within epochs", "resume", "current_score"),
        ("best, link", "within epochs", "resume", "current_score"),
        ("best, under one name, overwritten", "within epochs", "resume", "current_score"),
        ("best 2, steps", "within epochs", "resume", "current_score"),
    ],
}


def allowed(*cell: str) -> set[str]:
    """Return what may, and so has to, differ in a training."""
    rows = [row for named in ALLOWED.values() for row in named]
    return {
        aspect
        for *where, aspects in rows
        if all(expected in ("*", actual) for expected, actual in zip(where, cell, strict=True))
        for aspect in aspects.split()
    }


def train(cls: type, directory: Path, arguments: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Train with a new callback, and return its files and attributes."""
    callback = cls(dirpath=directory, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(callback, **options)
    return {"files": held(directory), **seen(callback, directory)}


def histories(
    cls: type, directory: Path, arguments: dict[str, Any], options: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Train in an empty directory; then, from what that left, anew and resumed from its newest file."""
    fresh = train(cls, directory, arguments, max_epochs=3, **options)
    yield "fresh", fresh
    kept = directory.with_name("kept")
    if directory.exists():
        shutil.copytree(directory, kept, symlinks=True)
    newest = max(fresh["files"], key=lambda name: (fresh["files"][name][0], name), default=None)
    if newest is not None:
        yield "resume", train(cls, directory, arguments, max_epochs=5, resume=directory / newest, **options)
    shutil.rmtree(directory, ignore_errors=True)
    if kept.exists():
        # The state in the files names the directory: it has to be the same one.
        kept.rename(directory)
    yield "rerun", train(cls, directory, arguments, max_epochs=3, **options)


@pytest.mark.skipif(not is_at_least("2.6"), reason="the table of differences is that of Lightning 2.6")
@pytest.mark.parametrize("validation", VALIDATION)
@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_each_training_leaves_what_lightnings_leaves(in_memory: Path, arguments: str, validation: str) -> None:
    """Fresh, anew in the same directory, and resumed; but for what the table names."""
    trainings = []
    for cls in (Theirs, Ours):
        directory = in_memory / "run"
        trainings.append(dict(histories(cls, directory, ARGUMENTS[arguments], VALIDATION[validation])))
        shutil.rmtree(directory, ignore_errors=True)
    theirs, ours = trainings
    assert set(theirs) <= set(ours) | ({"resume"} - set(ours))
    for history in theirs.keys() & ours.keys():
        differ = {name for name, value in theirs[history].items() if value != ours[history][name]}
        assert allowed(arguments, validation, history) == differ, (history, theirs[history], ours[history])


def test_the_table_names_trainings_that_there_are() -> None:
    """A row that is misspelt would allow nothing, in silence."""
    for rows in ALLOWED.values():
        for arguments, validation, history, _ in rows:
            assert arguments in ARGUMENTS
            assert validation in {"*", *VALIDATION}
            assert history in {"*", "fresh", "rerun", "resume"}
