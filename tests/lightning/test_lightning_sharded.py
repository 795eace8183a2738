"""Two processes whose model is in shards (FSDP2, on the CPU): a checkpoint is a folder, and appears whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpointer_lightning import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from support.half import half
from tiny import Model, files, fit, quiet, together

from checkpointer import CheckpointManager
from checkpointer.errors import SaveError

pytestmark = [pytest.mark.slow, quiet]


class Sharded(Model):
    """Has its layer spread over the processes."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        assert self.device_mesh is not None
        fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])


def test_50_and_74_folders_of_shards_are_ranked_retired_and_resumed(tmp_path: Path) -> None:
    """Staged and moved into place in one step, removed with all that is in them, and found by last."""
    directory = tmp_path / "run"

    def train(epochs: int, resume: Any) -> None:
        callback = ModelCheckpoint(directory, "{epoch}", monitor="val_loss", save_last="link", save_on_exception=True)
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
        options: dict[str, Any] = {"strategy": strategy, "devices": 2, "max_epochs": epochs, "resume": resume}
        training = fit(callback, model=Sharded(), **options)
        written = {"step": training.global_step, "best": callback.best_model_path, "from": str(training.ckpt_path)}
        (tmp_path / f"rank{training.global_rank}.json").write_text(json.dumps(written))

    together(*[lambda: train(2, None)] * 2)
    together(*[lambda: train(3, "last")] * 2)
    written = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert written[0] == written[1]
    assert {"step": 6, "best": str(directory / "epoch=1.ckpt"), "from": str(directory / "last.ckpt")} == written[0]
    shards = {name.partition("/")[0] for name in files(directory) if name.endswith(".distcp")}
    assert {"epoch=1.ckpt", "epoch=2.ckpt"} == shards
    assert ["epoch=1.ckpt", "epoch=2.ckpt"] == [record.name for record in CheckpointManager(directory).records]
    assert "epoch=2.ckpt" == (directory / "last.ckpt").readlink().name


class Holding(Model):
    """Puts half of a tensor into its checkpoints."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = {"half": half()}


class Plugin(TorchCheckpointIO):
    """Not Lightning's own: it writes by itself, on rank 0 alone."""


@pytest.mark.parametrize("plugins", [[], [Plugin()], [AsyncCheckpointIO()]], ids=["plain", "plugin", "background"])
def test_a_shard_in_a_checkpoint_of_rank_0_is_refused_by_name(tmp_path: Path, plugins: list[Any]) -> None:
    """Whether the manager writes, or a plugin that would store half of the tensor."""
    with pytest.raises(
        SaveError, match=r"\['mine'\]\['half'\] is a torch.distributed.tensor.DTensor that other processes"
    ):
        fit(ModelCheckpoint(tmp_path), model=Holding(), plugins=plugins, max_epochs=1)
    assert [] == [name for name in files(tmp_path) if name.endswith(".ckpt")]


def test_lightning_refuses_its_first_fsdp_on_the_cpu(tmp_path: Path) -> None:
    """So only the second is tried here; both write through the same path."""
    with pytest.raises(ValueError, match="The strategy `fsdp` requires a GPU accelerator"):
        fit(ModelCheckpoint(tmp_path), strategy=FSDPStrategy(), devices=2, max_epochs=1)
