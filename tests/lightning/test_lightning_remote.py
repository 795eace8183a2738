"""Directories that are URLs: the state streams there, resumes come from there, and nothing of others is touched."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from checkpointer_lightning import CheckpointCallback, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from tiny import BATCHES, Model, files, fit, quiet

from checkpointer import CheckpointManager, EveryEpochs, KeepBest, KeepLast, Mirror, Policy

pytestmark = quiet

BEST_AND_LAST = Policy(
    EveryEpochs(1), [KeepBest(1, "val_loss", mode="min"), KeepLast(1)], name="{epoch}-{val_loss:.0f}", last="copy"
)


@pytest.fixture
def url() -> str:
    """A folder in fsspec's memory that no other test has."""
    return f"memory://{uuid.uuid4().hex}/run"


def held(url: str) -> dict[str, int]:
    """Return the files of a URL, each with the step it holds."""
    filesystem, root = fsspec.core.url_to_fs(url)
    found = {}
    for path in filesystem.find(root):
        name = path[len(root) :].lstrip("/")
        if not name.startswith(".checkpointer"):
            with filesystem.open(path) as stream:
                found[name] = torch.load(stream, weights_only=True)["global_step"]
    return found


@pytest.mark.parametrize("kind", ["drop-in", "policy"])
def test_a_run_is_saved_at_a_url(url: str, kind: str) -> None:
    """Best, last and what is shown are as in a folder; ``"last"``, ``"best"`` and a URL resume it."""

    def make() -> Any:
        if kind == "policy":
            return CheckpointCallback(url, BEST_AND_LAST)
        return ModelCheckpoint(url, "{epoch}-{val_loss:.0f}", monitor="val_loss", save_last=True)

    callback = make()
    fit(callback, max_epochs=3)
    best, newest = "epoch=1-val_loss=3.ckpt", {"epoch=2-val_loss=4.ckpt": 12} if kind == "policy" else {}
    assert {best: 8, "last.ckpt": 12, **newest} == held(url)
    assert f"{url}/{best}" == callback.best_model_path
    assert f"{url}/last.ckpt" == callback.last_model_path

    assert 4 * BATCHES == fit(make(), resume="last", max_epochs=4).global_step
    again = make()
    training = fit(again, resume=f"{url}/epoch=3-val_loss=2.ckpt", max_epochs=5)
    assert 5 * BATCHES == training.global_step
    assert again.best_model_path.startswith(url)
    training.validate(Model(), dataloaders=training.val_dataloaders, ckpt_path="best", verbose=False)
    assert training.ckpt_path == again.best_model_path


@pytest.mark.parametrize("kind", ["drop-in", "policy"])
def test_a_password_of_the_directory_goes_into_no_payload(kind: str) -> None:
    """A checkpoint is shared more widely than a URL; what is read from it has the URL of the callback again."""
    password = "hunter2pass"
    folder = uuid.uuid4().hex
    url, shown = f"memory://me:{password}@{folder}/run", f"memory://{folder}/run"

    def make() -> Any:
        if kind == "policy":
            return CheckpointCallback(url, BEST_AND_LAST)
        return ModelCheckpoint(url, "{epoch}-{val_loss:.0f}", monitor="val_loss", save_last=True)

    callback = make()
    fit(callback, max_epochs=2)
    filesystem, root = fsspec.core.url_to_fs(url)
    for path in filesystem.find(root):
        assert password.encode() not in filesystem.cat_file(path), path
    state = callback.state_dict()
    assert f"{url}/epoch=1-val_loss=3.ckpt" == callback.best_model_path
    assert f"{shown}/epoch=1-val_loss=3.ckpt" == state["best_model_path"]
    again = make()
    again.load_state_dict(state)
    names = ("dirpath", "best_model_path", "best_k_models", "kth_best_model_path", "last_model_path")
    assert [getattr(callback, name) for name in names] == [getattr(again, name) for name in names]
    assert 3 * BATCHES == fit(make(), resume="last", max_epochs=3).global_step


def test_49_the_run_that_was_resumed_from_is_left_alone() -> None:
    """Lightning deletes it when both are URLs."""
    first, second = (f"memory://{uuid.uuid4().hex}/{name}" for name in ("first", "second"))
    fit(ModelCheckpoint(first, "{epoch}", monitor="val_loss"), max_epochs=2)
    before = held(first)
    fit(ModelCheckpoint(second, "{epoch}", monitor="val_loss"), resume=f"{first}/epoch=1.ckpt", max_epochs=4)
    assert {"epoch=1.ckpt": 8} == before == held(first)
    assert {"epoch=3.ckpt": 16} == held(second)


def test_a_run_of_lightnings_own_class_goes_on_at_its_url(url: str) -> None:
    """Its files are adopted there too: the second best is retired when a better one comes."""
    from lightning.pytorch.callbacks import ModelCheckpoint as Theirs

    fit(Theirs(url, "{epoch}", monitor="val_loss", save_top_k=1, save_last=True), max_epochs=2)
    callback = ModelCheckpoint(url, "{epoch}", monitor="val_loss", save_top_k=1)
    fit(callback, resume=f"{url}/last.ckpt", max_epochs=4)
    assert {"epoch=3.ckpt": 16, "last.ckpt": 8} == held(url)


class Plugin(TorchCheckpointIO):
    """A user's own way of writing: a file, or a folder."""

    def __init__(self, folder: bool) -> None:
        self.folder = folder
        self.paths: list[str] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.paths.append(path)
        super().save_checkpoint(checkpoint, f"{path}/all.pt" if self.folder else path)


@pytest.mark.parametrize("folder", [False, True])
def test_a_plugin_writes_to_a_url_that_is_free(url: str, folder: bool) -> None:
    """Nothing can be staged there, so what is written is never the name of a checkpoint or of an alias."""
    plugin = Plugin(folder)
    policy = Policy(EveryEpochs(1), [KeepBest(1, "val_loss", mode="min")], name="{epoch}", last="copy")
    callback = CheckpointCallback(url, policy)
    fit(callback, plugins=[plugin], max_epochs=4)
    assert [f"{url}/epoch={epoch}.ckpt" for epoch in range(4)] == plugin.paths
    inside = "/all.pt" if folder else ""
    assert {f"epoch=3.ckpt{inside}": 16, f"last.ckpt{inside}": 16} == held(url)
    assert [(16, "epoch=3.ckpt")] == [(record.step, record.name) for record in CheckpointManager(url).records]


def test_a_plugin_that_fails_leaves_nothing_at_the_url(url: str) -> None:
    """Half a checkpoint has no record, and is removed with the name that announced it."""

    class Failing(Plugin):
        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            super().save_checkpoint(checkpoint, path)
            raise OSError(28, "No space left on device")

    with pytest.raises(RuntimeError, match="No space left on device"):
        fit(ModelCheckpoint(url), plugins=[Failing(True)], max_epochs=1)
    assert {} == held(url)
    assert () == CheckpointManager(url).records


def test_last_goes_by_a_copy_where_the_trainer_lacks_the_options(url: str) -> None:
    """What needs ``storage_options`` is opened with them; the copy is gone once it is loaded."""
    options = {"use_listings_cache": False}
    policy = Policy(EveryEpochs(1), [KeepLast(1)], name="{epoch}")
    fit(CheckpointCallback(url, policy, storage_options=options), max_epochs=1)
    training = fit(CheckpointCallback(url, policy, storage_options=options), resume="last", max_epochs=2)
    copy = Path(str(training.ckpt_path))
    assert ("epoch=0.ckpt", False) == (copy.name, copy.parent.exists())
    assert {"epoch=1.ckpt": 8} == held(url)


def test_a_mirror_holds_a_copy_and_last_comes_from_it(tmp_path: Path, url: str) -> None:
    """The disk is lost; the run goes on from what was mirrored, in an empty folder."""
    policy = Policy(EveryEpochs(1), [KeepLast(2)], name="{epoch}")
    fit(CheckpointCallback(tmp_path / "a", policy, mirror=Mirror(url, keep=[KeepLast(1)])), max_epochs=2)
    assert {"epoch=1.ckpt": 8} == held(url)
    again = CheckpointCallback(tmp_path / "b", policy, mirror=Mirror(url, keep=[KeepLast(1)]))
    training = fit(again, resume="last", max_epochs=3)
    assert str(tmp_path / "b/epoch=1.ckpt") == training.ckpt_path
    assert ["epoch=1.ckpt", "epoch=2.ckpt"] == files(tmp_path / "b")
    assert {"epoch=2.ckpt": 12} == held(url)
