"""Loggers that upload checkpoints, without a server: what they take of the drop-in is what they take of Lightning's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpointer_lightning import ModelCheckpoint as Ours
from lightning.pytorch.callbacks import ModelCheckpoint as Theirs
from tiny import files, fit, quiet

pytestmark = [quiet, pytest.mark.filterwarnings("ignore")]

ARGUMENTS: dict[str, dict[str, Any]] = {
    "best": {"monitor": "val_loss", "save_top_k": 2},
    "newest": {},
    "all, last": {"save_top_k": -1, "save_last": True},
}


def needs(name: str) -> None:
    """Skip without the package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(name, reason=f"needs {name}, which make hosts installs")


@pytest.mark.parametrize("log_model", ["all", True])
@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_wandb_takes_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, log_model: Any
) -> None:
    """Each as it is saved, or the best at the end; offline."""
    needs("wandb")
    from lightning.pytorch.loggers import WandbLogger

    # The logger itself refuses checkpoints if it is offline.
    for name, value in {"WANDB_SILENT": "true", "WANDB_MODE": "offline"}.items():
        monkeypatch.setenv(name, value)
    taken = []
    for cls in (Theirs, Ours):
        directory = tmp_path / cls.__module__
        directory.mkdir()
        logger = WandbLogger(save_dir=directory, log_model=log_model, id="run", project="tiny")
        fit(cls(directory / "run", **ARGUMENTS[arguments]), logger=logger, max_epochs=3)
        taken.append({Path(path).name for path in logger._logged_model_time})
        logger.experiment.finish()
    theirs, ours = taken
    assert theirs == ours
    assert ours


@pytest.mark.parametrize("log_model", ["all", True])
@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_mlflow_takes_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, log_model: Any
) -> None:
    """With the same metadata and aliases, in its file store."""
    needs("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from lightning.pytorch.loggers import MLFlowLogger

    taken = []
    for cls in (Theirs, Ours):
        directory = tmp_path / cls.__module__
        logger = MLFlowLogger(tracking_uri=f"file:{directory}/mlruns", log_model=log_model)
        fit(cls(directory / "run", **ARGUMENTS[arguments]), logger=logger, max_epochs=3)
        (artifacts,) = directory.glob("mlruns/*/*/artifacts")
        texts = {name: (artifacts / name).read_text() for name in files(artifacts) if not name.endswith(".ckpt")}
        assert "Checkpoint" in yaml.safe_load(next(text for name, text in texts.items() if name.endswith("yaml")))
        taken.append((files(artifacts), texts))
    theirs, ours = taken
    assert theirs == ours
