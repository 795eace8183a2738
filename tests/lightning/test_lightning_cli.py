"""LightningCLI: both callbacks from a config file, and what it prints of them is a config that says the same."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("jsonargparse", reason="needs jsonargparse[signatures]: LightningCLI does")

import lightning.pytorch as pl
from checkpointer_lightning import CheckpointCallback, ModelCheckpoint
from tiny import Model, files, loader, quiet

from checkpointer import (
    AnyOf,
    CheckpointManager,
    EveryEpochs,
    EverySeconds,
    EverySteps,
    KeepBest,
    KeepEvery,
    KeepLast,
    Policy,
)

with warnings.catch_warnings():
    # Older Lightning says of itself how old it is.
    warnings.simplefilter("ignore")
    from lightning.pytorch.cli import LightningCLI

pytestmark = [
    quiet,
    # LightningCLI and jsonargparse say what of themselves is old.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

POLICY = Policy(
    EveryEpochs(1),
    [KeepBest(1, "val_loss", mode="min"), KeepLast(1), KeepEvery(epochs=50)],
    name="{epoch}-{val_loss:.1f}",
    last="link",
)
COMPOSED = Policy(AnyOf(EverySteps(3), EverySeconds(1800)), [KeepLast(1)])
CONFIG = """
trainer:
  logger: false
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  max_epochs: 3
  callbacks:
    - class_path: checkpointer_lightning.ModelCheckpoint
      init_args:
        dirpath: drop-in
        monitor: val_loss
        save_top_k: 1
        save_last: link
    - class_path: checkpointer_lightning.ModelCheckpoint
      init_args:
        dirpath: timed
        save_last: true
        train_time_interval: "24:00:00"
    - class_path: checkpointer_lightning.CheckpointCallback
      init_args:
        directory: policy
        policy:
          when: {class_path: checkpointer.EveryEpochs, init_args: {n: 1}}
          keep:
            - class_path: checkpointer.KeepBest
              init_args: {k: 1, metric: {key: val_loss, mode: min}}
            - {class_path: checkpointer.KeepLast, init_args: {n: 1}}
            - {class_path: checkpointer.KeepEvery, init_args: {epochs: 50}}
          name: {template: "{epoch}-{val_loss:.1f}"}
          last: link
    - class_path: checkpointer_lightning.CheckpointCallback
      init_args: {directory: read, policy: policy.yaml}
"""


class Data(pl.LightningDataModule):
    """The tiny batches."""

    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader(1)


def call(*args: str) -> LightningCLI:
    """Run the command line, as a program would."""
    return LightningCLI(Model, Data, save_config_callback=None, args=list(args), seed_everything_default=1)


def test_a_config_makes_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The arguments arrive as what they are, the policy as a policy; and the printed config is one that says it all."""
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(CONFIG)
    COMPOSED.to_yaml("policy.yaml")
    monkeypatch.setattr("sys.argv", ["train"])
    drop_in, timed, composed, read = call("fit", "--config", "config.yaml").trainer.checkpoint_callbacks
    assert isinstance(drop_in, ModelCheckpoint)
    assert ("val_loss", 1, "link") == (drop_in.monitor, drop_in.save_top_k, drop_in.save_last)
    assert isinstance(timed, ModelCheckpoint)
    assert 86400 == timed._train_time_interval.total_seconds()
    assert isinstance(composed, CheckpointCallback)
    assert isinstance(read, CheckpointCallback)
    assert (POLICY, COMPOSED) == (composed.policy, read.policy)
    assert ["epoch=1-step=8.ckpt", "epoch=2-step=12.ckpt", "last.ckpt"] == files("drop-in")
    assert ["epoch=1-val_loss=3.0.ckpt", "epoch=2-val_loss=4.0.ckpt", "last.ckpt"] == files("policy")
    assert [8, 12] == [record.step for record in CheckpointManager("policy").records]

    printed = []
    for config in ("config.yaml", "printed.yaml"):
        with pytest.raises(SystemExit):
            call("fit", "--config", config, "--print_config")
        printed.append(capsys.readouterr().out)
        Path("printed.yaml").write_text(printed[-1])
    assert printed[0] == printed[1]
    saved = yaml.safe_load(printed[0])["trainer"]["callbacks"][2]["init_args"]
    assert "policy" == saved["directory"]
    assert {"n": 1, "after": 0} == saved["policy"]["when"]["init_args"]


def test_arguments_of_the_command_line_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a config, argument by argument."""
    monkeypatch.setattr("sys.argv", ["train"])
    made = call(
        "fit",
        *("--trainer.callbacks", "checkpointer_lightning.ModelCheckpoint"),
        *("--trainer.callbacks.dirpath", str(tmp_path / "d")),
        *("--trainer.callbacks.save_last", "true"),
        *("--trainer.callbacks.every_n_train_steps", "3"),
        *("--trainer.fast_dev_run", "true"),
        *("--trainer.accelerator", "cpu"),
    )
    (callback,) = made.trainer.checkpoint_callbacks
    assert isinstance(callback, ModelCheckpoint)
    assert (True, 3, str(tmp_path / "d")) == (callback.save_last, callback._every_n_train_steps, callback.dirpath)


SHORT = """
import pickle, sys, warnings
warnings.simplefilter("ignore")
from checkpointer_lightning import CheckpointCallback
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
config = "[{class_path: ModelCheckpoint, init_args: {dirpath: d}}]"
args = ["fit", "--trainer.callbacks", config, "--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu"]
sys.argv = ["train"]
(callback,) = LightningCLI(BoringModel, save_config_callback=None, args=args).trainer.checkpoint_callbacks
print(type(callback).__module__)
print(type(pickle.load(sys.stdin.buffer)).__module__)
"""


@pytest.mark.slow
def test_the_policys_callback_leaves_the_short_name_to_lightnings_class(tmp_path: Path) -> None:
    """A second class of that name would be ambiguous, so the drop-in is made on first use, such as an unpickling."""
    done = subprocess.run(
        [sys.executable, "-c", SHORT],
        cwd=tmp_path,
        input=pickle.dumps(ModelCheckpoint(tmp_path)),
        capture_output=True,
        check=False,
    )
    modules = ["lightning.pytorch.callbacks.model_checkpoint", "checkpointer_lightning.for_lightning"]
    assert modules == [line for line in done.stdout.decode().splitlines() if line in modules], done.stderr.decode()
