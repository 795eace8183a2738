"""``lightning`` and ``pytorch_lightning``, each with its own class; the wrong mix; and neither installed."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpointer_lightning
import pytest
from tiny import fit, quiet, trainer

from checkpointer import EveryEpochs, KeepLast, Policy

pytestmark = quiet

POLICY = Policy(EveryEpochs(1), [KeepLast(1)])


def make(kind: str, module: Any, directory: Path) -> Any:
    """Return a callback of one of the two kinds."""
    return module.ModelCheckpoint(directory) if kind == "drop-in" else module.CheckpointCallback(directory, POLICY)


def other() -> Any:
    """Return the adapter for the other package."""
    pytest.importorskip("pytorch_lightning", reason="needs pytorch_lightning beside lightning")
    from checkpointer_lightning import for_pytorch_lightning

    return for_pytorch_lightning


@pytest.mark.parametrize("package", ["lightning", "pytorch_lightning"])
def test_constructors_have_types_and_not_their_names(package: str) -> None:
    """Tools that build parsers ask the signature; the drop-in's has the very types of Lightning's."""
    pytest.importorskip(package)
    module = importlib.import_module(f"checkpointer_lightning.for_{package}")
    ours, composed = (
        inspect.signature(kind).parameters for kind in (module.ModelCheckpoint, module.CheckpointCallback)
    )
    theirs = inspect.signature(module.Theirs).parameters
    assert {name: theirs[name].annotation for name in theirs} == {name: ours[name].annotation for name in theirs}
    assert [] == [name for name, part in (*ours.items(), *composed.items()) if isinstance(part.annotation, str)]


@pytest.mark.parametrize("kind", ["drop-in", "policy"])
def test_the_other_package_is_served_by_its_own_class(tmp_path: Path, kind: str) -> None:
    """Its Trainer takes the callback for what it is, and ``"last"`` is found."""
    module = other()
    import pytorch_lightning as pl

    class Model(pl.LightningModule):
        def __init__(self) -> None:
            import torch

            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch).sum()

        def configure_optimizers(self) -> Any:
            import torch

            return torch.optim.SGD(self.parameters(), 0.1)

    import torch

    data: Any = torch.ones(4, 1, 2)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    for epochs in (1, 2):
        training = pl.Trainer(callbacks=make(kind, module, tmp_path), max_epochs=epochs, **options)
        training.fit(Model(), data, ckpt_path="last")
    assert 8 == training.global_step
    assert ["epoch=1-step=8.ckpt"] == [path.name for path in tmp_path.glob("*.ckpt")]


@pytest.mark.parametrize("kind", ["drop-in", "policy"])
def test_the_wrong_mix_is_refused_with_the_right_import(tmp_path: Path, kind: str) -> None:
    """Before the Trainer fails with an unrelated message."""
    wrong = (
        r"is for a Trainer of pytorch_lightning, .* of lightning; import it from checkpointer_lightning.for_lightning"
    )
    with pytest.raises(TypeError, match=wrong):
        fit([make(kind, other(), tmp_path)])
    import pytorch_lightning as pl

    wrong = r"is for a Trainer of lightning, .*; import it from checkpointer_lightning.for_pytorch_lightning"
    with pytest.raises(TypeError, match=wrong):
        pl.Trainer(callbacks=[make(kind, checkpointer_lightning, tmp_path)], logger=False, accelerator="cpu")


def test_the_package_offers_the_class_of_what_is_installed() -> None:
    """``lightning`` first; two names, and no more."""
    assert "checkpointer_lightning.for_lightning" == checkpointer_lightning.ModelCheckpoint.__module__
    assert ["CheckpointCallback", "ModelCheckpoint"] == checkpointer_lightning.__all__ == dir(checkpointer_lightning)
    with pytest.raises(AttributeError, match="has no attribute 'Checkpoint'"):
        checkpointer_lightning.Checkpoint  # noqa: B018
    assert trainer(None).callbacks is not None


HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name in {hidden} else find(name)
import checkpointer
assert checkpointer.CheckpointManager(None).records == ()
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, with this one's import path."""
    environment = {"PYTHONPATH": ":".join(sys.path)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    "how", ["from checkpointer_lightning import ModelCheckpoint", "import checkpointer_lightning.for_lightning"]
)
def test_without_lightning_the_error_names_the_extra(how: str) -> None:
    """And the rest of the library works."""
    found = run(HIDE.format(hidden=("lightning", "pytorch_lightning")) + how)
    assert "ImportError" in found.stderr
    assert "pip install 'torch-checkpointer[lightning]'" in found.stderr.splitlines()[-1]


def test_with_pytorch_lightning_alone_its_class_is_offered() -> None:
    """No need to know the longer name."""
    other()
    code = "from checkpointer_lightning import ModelCheckpoint as M; print(M.__module__)"
    found = run(HIDE.format(hidden=("lightning",)) + code)
    assert "checkpointer_lightning.for_pytorch_lightning\n" == found.stdout, found.stderr
